// Products of bf16 matrices with an fp32 result, which at::mm does not have on a CPU: a logit rounded to bf16 is off by
// 0.03 nats. Tiles go through the oneDNN kernels that torch exports (AMX, or AVX-512 with bf16), packed here.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace rlhf_kernels {

// Whether this machine has them, for hidden states of this width.
bool has_bf16_products(int64_t width);

// out[n, V] = hidden[n, H] · weight[V, H]ᵀ + bias, in fp32; hidden and out are contiguous.
void bf16_logits(const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                 const at::Tensor& out);

// out[V, H] (+)= dlogits[n, V]ᵀ · hidden[n, H], in fp32; out is contiguous.
void add_bf16_weight_gradient(const at::Tensor& dlogits, const at::Tensor& hidden, bool add, const at::Tensor& out);

}  // namespace rlhf_kernels
