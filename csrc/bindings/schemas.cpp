// The operators of the namespace `ditscale`: schemas only. The libraries of each device add their implementations.
//
// Shapes: x, branch, y [B, T, D]; shift, scale, gate [D], [B, D], [B, 1, D] or [B, T, D], all of one call alike; stats
// [2, B, T] float32: mean, then reciprocal standard deviation. The `infer` operators keep none, for calls that no gradient
// follows or that compute them again: a result more costs a small call a third of its time, and so does every number that
// differs from its default.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ditscale, m) {
  m.def(
      "layernorm_modulate_fwd(Tensor x, Tensor shift, Tensor scale, float eps=1e-06, float scale_base=1., "
      "bool rms=False) -> (Tensor y, Tensor stats)");
  m.def(
      "layernorm_modulate_infer(Tensor x, Tensor shift, Tensor scale, float eps=1e-06, float scale_base=1., "
      "bool rms=False) -> Tensor");
  m.def(
      "layernorm_modulate_bwd(Tensor dy, Tensor x, Tensor scale, Tensor? stats=None, float eps=1e-06, "
      "float scale_base=1., bool rms=False) -> (Tensor dx, Tensor dshift, Tensor dscale)");
  m.def("gate_residual_fwd(Tensor x, Tensor branch, Tensor gate) -> Tensor");
  m.def("gate_residual_bwd(Tensor dout, Tensor branch, Tensor gate) -> (Tensor dbranch, Tensor dgate)");
  m.def(
      "gate_residual_layernorm_modulate_fwd(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, "
      "float eps=1e-06, float scale_base=1., bool rms=False) -> (Tensor x_new, Tensor y, Tensor stats)");
  m.def(
      "gate_residual_layernorm_modulate_infer(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, "
      "float eps=1e-06, float scale_base=1., bool rms=False) -> (Tensor x_new, Tensor y)");
  m.def(
      "gate_residual_layernorm_modulate_bwd(Tensor dy, Tensor? dx_new, Tensor x_new, Tensor branch, Tensor gate, "
      "Tensor scale, Tensor? stats=None, float eps=1e-06, float scale_base=1., bool rms=False) -> "
      "(Tensor dx, Tensor dbranch, Tensor dgate, Tensor dshift, Tensor dscale)");
  m.def("bias_gelu_fwd(Tensor x, Tensor bias) -> Tensor");
  m.def("bias_gelu_bwd(Tensor dy, Tensor x, Tensor bias) -> (Tensor dx, Tensor dbias)");
  // What each argument and result is: kernels/attn/shapes.py.
  m.def(
      "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? lengths, Tensor? cu_q, Tensor? cu_k, "
      "int max_q, int max_k, float scale, bool save_stats) -> (Tensor out, Tensor stats)");
  m.def(
      "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, Tensor? key_bias, "
      "Tensor? lengths, Tensor? cu_q, Tensor? cu_k, int max_q, int max_k, float scale, bool bias_grad) -> "
      "(Tensor dq, Tensor dk, Tensor dv, Tensor dkey_bias)");
  m.def(
      "attention_qkv_fwd(Tensor qkv, Tensor? key_bias, Tensor? lengths, Tensor? cu, int max_seqlen, float scale, "
      "bool save_stats) -> (Tensor out, Tensor stats)");
  m.def(
      "attention_qkv_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor stats, Tensor? key_bias, Tensor? lengths, "
      "Tensor? cu, int max_seqlen, float scale, bool bias_grad) -> (Tensor dqkv, Tensor dkey_bias)");
  // x [M, K], weight [N, K], bias [N]: x weight^T + bias; `always` by ours, however small (but for vectors).
  m.def("product(Tensor x, Tensor weight, Tensor? bias, bool always) -> Tensor");
  // A step of AdamW and of the weights' moving average, in place: all [N] or of one shape, `step` from 1.
  m.def(
      "adamw_average_(Tensor(a!) weight, Tensor gradient, Tensor(b!) first, Tensor(c!) second, Tensor(d!)? average, "
      "int step, float lr, float beta1, float beta2, float eps, float weight_decay, float clip, float decay) -> ()");
  // Queries or keys: x [B, H, T, K]; weight [K]; cos, sin [T, K / 2] or [B, T, K / 2]; norm 0 none, 1 rms, 2 layer.
  m.def(
      "qk_norm_rope_fwd(Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, float eps, int norm, bool interleaved) -> Tensor");
  m.def(
      "qk_norm_rope_(Tensor(a!) x, Tensor? weight, Tensor? cos, Tensor? sin, float eps, int norm, bool interleaved) -> ()");
  m.def(
      "qk_norm_rope_bwd(Tensor dout, Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, float eps, int norm, "
      "bool interleaved) -> (Tensor dx, Tensor dweight)");
}
