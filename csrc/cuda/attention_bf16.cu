#include "attention_launch.h"

template struct ditscale::cuda::AttentionOf<ditscale::cuda::bf16>;
