#include "attention_launch.h"

template struct ditscale::cuda::AttentionOf<float>;
