// The matrix products of the ops over a head, where at::mm is not the one to take. Tiles go through the oneDNN kernels
// that torch exports, packed here.
//
// bf16 with an fp32 result: at::mm has none on a CPU, and a logit rounded to bf16 is off by 0.03 nats. AMX, or AVX-512
// with bf16.
// fp32 on CPUs that are not Intel's: there at::mm is MKL's, which leaves AVX-512 unused.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace rlhf_kernels {

// Whether this machine has them, for hidden states of this width.
bool has_bf16_products(int64_t width);
bool has_fp32_products(int64_t width);

// out[n, V] = hidden[n, H] · weight[V, H]ᵀ + bias, in fp32; hidden, weight and out are contiguous.
void bf16_logits(const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                 const at::Tensor& out);
void fp32_logits(const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                 const at::Tensor& out);

// dlogits[n, V] · weight[V, H]; weight is contiguous.
at::Tensor fp32_hidden_gradient(const at::Tensor& dlogits, const at::Tensor& weight);

// out[V, H] (+)= dlogits[n, V]ᵀ · hidden[n, H], in fp32; hidden and out are contiguous.
void add_bf16_weight_gradient(const at::Tensor& dlogits, const at::Tensor& hidden, bool add, const at::Tensor& out);
void add_fp32_weight_gradient(const at::Tensor& dlogits, const at::Tensor& hidden, bool add, const at::Tensor& out);

}  // namespace rlhf_kernels
