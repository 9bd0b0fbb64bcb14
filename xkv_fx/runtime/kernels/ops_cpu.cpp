// The CPU kernels as operators. Python's part of a call costs 20 us, which a decode step would pay for every layer.
//
// Kernels are built for dtypes and shapes, and loaded one by one; whoever loads one hands it in here.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdio>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// dtype, query heads for each KV head, key and value dimensions, whether weights are whole numbers
using Shape = std::array<int64_t, 5>;
using Decode = int (*)(const void*, const void*, const void*, void*, void*, const int64_t*, const void*, const float*,
                       void*, int64_t, int64_t, int64_t, int64_t, int64_t, float, float, int);
using Linear = void (*)(const void*, const void* const*, const void* const*, void*, const int64_t*, int64_t, int64_t,
                        int64_t, int);

std::mutex guard;
std::map<Shape, void*> kernels;

void* kernel(const Tensor& like, int64_t group, int64_t key_dim, int64_t value_dim, bool whole) {
  const std::lock_guard<std::mutex> lock(guard);
  const auto found = kernels.find({static_cast<int64_t>(like.scalar_type()), group, key_dim, value_dim, whole});
  STD_TORCH_CHECK(found != kernels.end(), "no CPU kernel was built for this dtype and shape");
  return found->second;
}

// By a call that does not go through the dispatcher: a decode step makes some hundred outputs.
Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  int32_t dtype = 0;
  AtenTensorHandle made = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_dtype(like.get(), &dtype) == AOTI_TORCH_SUCCESS &&
                      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                               aoti_torch_device_type_cpu(), 0, &made) == AOTI_TORCH_SUCCESS,
                  "an output could not be allocated");
  return Tensor(made);
}

Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& slot, const Tensor& mask, double scale, std::optional<double> softcap,
                        const std::optional<Tensor>& sinks) {
  const int64_t kv_heads = k_cache.size(1), slots = k_cache.size(2);
  const auto decode = reinterpret_cast<Decode>(kernel(q, q.size(1) / kv_heads, k_cache.size(3), v_cache.size(3), false));
  STD_TORCH_CHECK(k_cache.is_contiguous() && v_cache.is_contiguous(), "the caches must be contiguous");
  const Tensor queries = dense(q), keys = dense(k), values = dense(v);
  const Tensor shown = mask.stride(3) == 1 ? mask : torch::stable::contiguous(mask);
  const std::optional<Tensor> extra = sinks.has_value() ? std::optional<Tensor>(dense(*sinks)) : std::nullopt;
  Tensor out = empty(q, {q.size(0), q.size(1), q.size(2), v_cache.size(3)});
  const int wrong = decode(
      queries.data_ptr(), keys.data_ptr(), values.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
      static_cast<const int64_t*>(slot.data_ptr()), shown.data_ptr(),
      extra.has_value() ? static_cast<const float*>(extra->data_ptr()) : nullptr, out.data_ptr(), q.size(0), kv_heads,
      slots, shown.stride(0), shown.size(1) == 1 ? 0 : shown.stride(1), static_cast<float>(scale),
      static_cast<float>(softcap.value_or(0.0)), static_cast<int>(torch::stable::get_num_threads()));
  STD_TORCH_CHECK(wrong == 0, "a slot lies outside the ", slots, " slots of the cache");
  return out;
}

Tensor linear(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) {
  const auto dtype = weights.at(0).scalar_type();
  const auto apply = reinterpret_cast<Linear>(kernel(x, 0, 0, 0, dtype != x.scalar_type()));
  const int64_t depth = x.size(-1), rows = x.numel() / depth;
  std::vector<const void*> matrices, added;
  std::vector<int64_t> widths;
  int64_t width = 0;
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(weight.is_contiguous() && weight.size(1) == depth, "weights must be contiguous, and as deep as x");
    STD_TORCH_CHECK(weight.scalar_type() == dtype && (dtype == x.scalar_type() || dtype == ScalarType::Char),
                    "weights must all be of the dtype of x, or all int8");
    matrices.push_back(weight.data_ptr());
    widths.push_back(weight.size(0));
    width += weight.size(0);
  }
  STD_TORCH_CHECK(biases.empty() || biases.size() == weights.size(), "either every layer has a bias, or none");
  for (const Tensor& bias : biases) added.push_back(bias.data_ptr());
  const Tensor inputs = dense(x);
  Tensor out = empty(x, {rows * width});
  apply(inputs.data_ptr(), matrices.data(), added.empty() ? nullptr : added.data(), out.data_ptr(), widths.data(),
        static_cast<int64_t>(widths.size()), rows, depth, static_cast<int>(torch::stable::get_num_threads()));
  return out;
}

// A tensor of the caller's.
Tensor lent(AtenTensorHandle of) {
  AtenTensorHandle another = nullptr;
  STD_TORCH_CHECK(aoti_torch_new_tensor_handle(of, &another) == AOTI_TORCH_SUCCESS, "a tensor could not be taken");
  return Tensor(another);
}

std::vector<Tensor> lent(const AtenTensorHandle* of, int64_t count) {
  std::vector<Tensor> tensors;
  for (int64_t i = 0; i < count; ++i) tensors.push_back(lent(of[i]));
  return tensors;
}

// The result of `compute`, which is the caller's from now on.
template <typename Compute>
AOTITorchError made(AtenTensorHandle* out, Compute compute) {
  try {
    return aoti_torch_new_tensor_handle(compute().get(), out);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "xkv_fx: %s\n", error.what());
    return AOTI_TORCH_FAILURE;
  }
}

}  // namespace

extern "C" void xkv_hand_in(int64_t dtype, int64_t group, int64_t key_dim, int64_t value_dim, int64_t whole,
                            void* made) {
  const std::lock_guard<std::mutex> lock(guard);
  kernels[{dtype, group, key_dim, value_dim, whole}] = made;
}

extern "C" AOTITorchError aoti_torch_cpu_decode_attention_cpu(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle k_cache, AtenTensorHandle v_cache,
    AtenTensorHandle slot, AtenTensorHandle mask, double scale, double* softcap, AtenTensorHandle* sinks,
    AtenTensorHandle* out) {
  return made(out, [&] {
    return decode_attention(lent(q), lent(k), lent(v), lent(k_cache), lent(v_cache), lent(slot), lent(mask), scale,
                            softcap == nullptr ? std::nullopt : std::optional<double>(*softcap),
                            sinks == nullptr ? std::nullopt : std::optional<Tensor>(lent(*sinks)));
  });
}

extern "C" AOTITorchError aoti_torch_cpu_linear_cpu(AtenTensorHandle x, const AtenTensorHandle* weights,
                                                    int64_t layers, const AtenTensorHandle* biases, int64_t biased,
                                                    AtenTensorHandle* out) {
  return made(out, [&] { return linear(lent(x), lent(weights, layers), lent(biases, biased)); });
}

STABLE_TORCH_LIBRARY_IMPL(xkv, CPU, library) {
  library.impl("decode_attention_cpu", TORCH_BOX(&decode_attention));
  library.impl("linear_cpu", TORCH_BOX(&linear));
}
