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
#include <utility>
#include <vector>

using torch::stable::Tensor;

namespace {

// dtype, query heads for each KV head, key and value dimensions, whether weights are int8, bits of keys and of values (0:
// those of the dtype)
using Shape = std::array<int64_t, 7>;
using Decode = int (*)(const void*, const void*, const void*, void*, void*, const int64_t*, const void*, const float*,
                       void*, int64_t, int64_t, int64_t, int64_t, int64_t, float, float, int);
using DecodeCoded = int (*)(const void*, const void*, const void*, void*, void*, void*, void*, const int64_t*, int64_t,
                            const void*, const float*, const float*, int32_t*, float*, const int64_t*, void*, int64_t,
                            int64_t, int64_t, int64_t, int64_t, float, float, int);
using Linear = void (*)(const void*, const void* const*, const void* const*, void*, const int64_t*, int64_t, int64_t,
                        int64_t, int);

std::mutex guard;
std::map<Shape, void*> kernels;

void check(AOTITorchError error, const char* what) { STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, what); }

// A tensor of the caller's, not counted as used: a decode step looks at some thousand.
struct Lent {
  AtenTensorHandle handle;
  Lent(AtenTensorHandle of) : handle(of) {}
  Lent(const Tensor& of) : handle(of.get()) {}
  template <typename Value, typename Ask>
  Value told(Ask ask) const {
    Value value{};
    check(ask(handle, &value), "a tensor cannot be read");
    return value;
  }
  void* data() const { return told<void*>(aoti_torch_get_data_ptr); }
  const int64_t* sizes() const { return told<int64_t*>(aoti_torch_get_sizes); }
  const int64_t* strides() const { return told<int64_t*>(aoti_torch_get_strides); }
  int64_t dim() const { return told<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return told<int64_t>(aoti_torch_get_numel); }
  int32_t dtype() const { return told<int32_t>(aoti_torch_get_dtype); }
  bool is_contiguous() const { return told<bool>(aoti_torch_is_contiguous); }
};

// A tensor as kernels read it, copied where it does not lie so.
struct Dense {
  std::optional<Tensor> copy;
  Lent seen;
  Dense(Lent x, bool as_it_lies) : seen(x) {
    if (as_it_lies) return;
    AtenTensorHandle another = nullptr;
    check(aoti_torch_new_tensor_handle(x.handle, &another), "a tensor cannot be taken");
    copy = torch::stable::contiguous(Tensor(another));
    seen = Lent(*copy);
  }
  explicit Dense(Lent x) : Dense(x, x.is_contiguous()) {}
};

// A result, the caller's once released. Made by a call that does not go through the dispatcher.
class Made {
  AtenTensorHandle handle = nullptr;

 public:
  template <size_t DIM>
  Made(int32_t dtype, const std::array<int64_t, DIM>& sizes) {
    std::array<int64_t, DIM> strides;
    strides.back() = 1;
    for (size_t i = DIM; i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
    check(aoti_torch_empty_strided(DIM, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle),
          "an output cannot be allocated");
  }
  Made(Made&& other) : handle(other.release()) {}
  ~Made() {
    if (handle != nullptr) aoti_torch_delete_tensor_object(handle);
  }
  void* data() const { return Lent(handle).data(); }
  AtenTensorHandle release() { return std::exchange(handle, nullptr); }
};

void* kernel(int32_t dtype, int64_t group, int64_t key_dim, int64_t value_dim, bool int8, int64_t key_bits = 0,
             int64_t value_bits = 0) {
  const std::lock_guard<std::mutex> lock(guard);
  const auto found = kernels.find({dtype, group, key_dim, value_dim, int8, key_bits, value_bits});
  STD_TORCH_CHECK(found != kernels.end(), "no CPU kernel was built for this dtype and shape");
  return found->second;
}

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

Made decode_attention(Lent q, Lent k, Lent v, Lent k_cache, Lent v_cache, Lent slot, Lent mask, double scale,
                      std::optional<double> softcap, std::optional<Lent> sinks) {
  const int64_t *asked = q.sizes(), *kept = k_cache.sizes();
  const int64_t rows = asked[0], heads = asked[1], kv_heads = kept[1], slots = kept[2], value_dim = v_cache.sizes()[3];
  const auto decode = reinterpret_cast<Decode>(kernel(q.dtype(), heads / kv_heads, kept[3], value_dim, false));
  STD_TORCH_CHECK(k_cache.is_contiguous() && v_cache.is_contiguous(), "the caches must be contiguous");
  const Dense queries(q), keys(k), values(v), into(slot), shown(mask, mask.strides()[3] == 1);
  const std::optional<Dense> extra = sinks.has_value() ? std::optional<Dense>(*sinks) : std::nullopt;
  const int64_t* apart = shown.seen.strides();
  Made out(q.dtype(), std::array{rows, heads, asked[2], value_dim});
  const int wrong = decode(
      queries.seen.data(), keys.seen.data(), values.seen.data(), k_cache.data(), v_cache.data(),
      static_cast<const int64_t*>(into.seen.data()), shown.seen.data(),
      extra.has_value() ? static_cast<const float*>(extra->seen.data()) : nullptr, out.data(), rows, kv_heads, slots,
      apart[0], mask.sizes()[1] == 1 ? 0 : apart[1], static_cast<float>(scale),
      static_cast<float>(softcap.value_or(0.0)), threads());
  STD_TORCH_CHECK(wrong == 0, "a slot lies outside the ", slots, " slots of the cache");
  return out;
}

// What eviction by score reads and changes besides.
struct Scored {
  Lent positions, scores, seen;
};

Made decode_coded(Lent q, Lent k, Lent v, Lent k_cache, Lent k_scales, Lent v_cache, Lent v_scales,
                  std::optional<Scored> scored, Lent slot, Lent mask, double scale, int64_t key_bits, int64_t value_bits,
                  std::optional<double> softcap, std::optional<Lent> sinks, std::optional<Lent> key_mean) {
  const int64_t *asked = q.sizes(), *kept = k_cache.sizes();
  const int64_t rows = asked[0], heads = asked[1], kv_heads = kept[1], slots = kept[2], value_dim = v.sizes()[3];
  const auto decode = reinterpret_cast<DecodeCoded>(
      kernel(q.dtype(), heads / kv_heads, asked[3], value_dim, false, key_bits, value_bits));
  for (const Lent& held : {k_cache, k_scales, v_cache, v_scales})
    STD_TORCH_CHECK(held.is_contiguous(), "the caches must be contiguous");
  const Dense queries(q), keys(k), values(v), into(slot), shown(mask, mask.strides()[3] == 1);
  const auto dense = [](const std::optional<Lent>& x) {
    return x.has_value() ? std::optional<Dense>(*x) : std::nullopt;
  };
  const std::optional<Dense> extra = dense(sinks), mean = dense(key_mean);
  std::optional<Dense> seen;
  if (scored.has_value()) {
    STD_TORCH_CHECK(scored->positions.is_contiguous() && scored->positions.dtype() == aoti_torch_dtype_int32(),
                    "the positions must be contiguous int32");
    STD_TORCH_CHECK(scored->scores.is_contiguous() && scored->scores.dtype() == aoti_torch_dtype_float32(),
                    "the scores must be contiguous float32");
    seen.emplace(scored->seen);
  }
  const auto floats = [](const std::optional<Dense>& x) {
    return x.has_value() ? static_cast<const float*>(x->seen.data()) : nullptr;
  };
  const int64_t* apart = shown.seen.strides();
  Made out(q.dtype(), std::array{rows, heads, asked[2], value_dim});
  const int wrong = decode(
      queries.seen.data(), keys.seen.data(), values.seen.data(), k_cache.data(), k_scales.data(), v_cache.data(),
      v_scales.data(), static_cast<const int64_t*>(into.seen.data()), slot.numel() / rows, shown.seen.data(),
      floats(extra), floats(mean), seen.has_value() ? static_cast<int32_t*>(scored->positions.data()) : nullptr,
      seen.has_value() ? static_cast<float*>(scored->scores.data()) : nullptr,
      seen.has_value() ? static_cast<const int64_t*>(seen->seen.data()) : nullptr, out.data(), rows, kv_heads, slots,
      apart[0], mask.sizes()[1] == 1 ? 0 : apart[1], static_cast<float>(scale),
      static_cast<float>(softcap.value_or(0.0)), threads());
  STD_TORCH_CHECK(wrong == 0, "a slot lies outside the ", slots, " slots of the cache");
  return out;
}

// `Each` is a handle, or has one.
template <typename Each>
Made linear(Lent x, const Each* weights, size_t layers, const Each* biases, size_t biased) {
  STD_TORCH_CHECK(layers > 0, "there is no layer to apply");
  STD_TORCH_CHECK(biased == 0 || biased == layers, "either every layer has a bias, or none");
  const int32_t dtype = x.dtype(), of_weights = Lent(weights[0]).dtype();
  const auto apply = reinterpret_cast<Linear>(kernel(dtype, 0, 0, 0, of_weights != dtype));
  const int64_t depth = x.sizes()[x.dim() - 1], rows = x.numel() / depth;
  thread_local std::vector<const void*> matrices, added;
  thread_local std::vector<int64_t> widths;
  matrices.clear(), added.clear(), widths.clear();
  int64_t width = 0;
  for (size_t i = 0; i < layers; ++i) {
    const Lent weight(weights[i]);
    const int64_t* sizes = weight.sizes();
    STD_TORCH_CHECK(weight.is_contiguous() && sizes[1] == depth, "weights must be contiguous, and as deep as x");
    STD_TORCH_CHECK(weight.dtype() == of_weights && (of_weights == dtype || of_weights == aoti_torch_dtype_int8()),
                    "weights must all be of the dtype of x, or all int8");
    matrices.push_back(weight.data());
    widths.push_back(sizes[0]);
    width += sizes[0];
    if (biased == 0) continue;
    const Lent bias(biases[i]);
    STD_TORCH_CHECK(bias.is_contiguous() && bias.numel() == sizes[0],
                    "biases must be contiguous, and of a number for each output");
    added.push_back(bias.data());
  }
  const Dense inputs(x);
  Made out(dtype, std::array{rows * width});
  apply(inputs.seen.data(), matrices.data(), biased == 0 ? nullptr : added.data(), out.data(), widths.data(),
        static_cast<int64_t>(layers), rows, depth, threads());
  return out;
}

std::optional<Lent> lent(const std::optional<Tensor>& x) {
  return x.has_value() ? std::optional<Lent>(*x) : std::nullopt;
}

Tensor decode_attention_of_tensors(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                                   const Tensor& v_cache, const Tensor& slot, const Tensor& mask, double scale,
                                   std::optional<double> softcap, const std::optional<Tensor>& sinks) {
  return Tensor(decode_attention(q, k, v, k_cache, v_cache, slot, mask, scale, softcap, lent(sinks)).release());
}

Tensor decode_coded_of_tensors(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                               const Tensor& k_scales, const Tensor& v_cache, const Tensor& v_scales,
                               const Tensor& slot, const Tensor& mask, double scale, int64_t key_bits,
                               int64_t value_bits, std::optional<double> softcap, const std::optional<Tensor>& sinks,
                               const std::optional<Tensor>& key_mean) {
  return Tensor(decode_coded(q, k, v, k_cache, k_scales, v_cache, v_scales, std::nullopt, slot, mask, scale, key_bits,
                             value_bits, softcap, lent(sinks), lent(key_mean))
                    .release());
}

Tensor decode_coded_scored_of_tensors(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                                      const Tensor& k_scales, const Tensor& v_cache, const Tensor& v_scales,
                                      const Tensor& positions, const Tensor& scores, const Tensor& slot,
                                      const Tensor& mask, const Tensor& seen, double scale, int64_t key_bits,
                                      int64_t value_bits, std::optional<double> softcap,
                                      const std::optional<Tensor>& sinks, const std::optional<Tensor>& key_mean) {
  return Tensor(decode_coded(q, k, v, k_cache, k_scales, v_cache, v_scales, Scored{positions, scores, seen}, slot, mask,
                             scale, key_bits, value_bits, softcap, lent(sinks), lent(key_mean))
                    .release());
}

Tensor linear_of_tensors(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) {
  return Tensor(linear(x, weights.data(), weights.size(), biases.data(), biases.size()).release());
}

std::optional<double> given(const double* x) { return x == nullptr ? std::nullopt : std::optional<double>(*x); }
std::optional<Lent> given(const AtenTensorHandle* x) {
  return x == nullptr ? std::nullopt : std::optional<Lent>(*x);
}

template <typename Compute>
AOTITorchError hand_over(AtenTensorHandle* out, Compute compute) {
  try {
    *out = compute().release();
    return AOTI_TORCH_SUCCESS;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "xkv_fx: %s\n", error.what());
    return AOTI_TORCH_FAILURE;
  }
}

}  // namespace

extern "C" void xkv_hand_in(int64_t dtype, int64_t group, int64_t key_dim, int64_t value_dim, int64_t int8,
                            int64_t key_bits, int64_t value_bits, void* made) {
  const std::lock_guard<std::mutex> lock(guard);
  kernels[{dtype, group, key_dim, value_dim, int8, key_bits, value_bits}] = made;
}

extern "C" AOTITorchError aoti_torch_cpu_decode_attention_cpu(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle k_cache, AtenTensorHandle v_cache,
    AtenTensorHandle slot, AtenTensorHandle mask, double scale, double* softcap, AtenTensorHandle* sinks,
    AtenTensorHandle* out) {
  return hand_over(out, [&] {
    return decode_attention(q, k, v, k_cache, v_cache, slot, mask, scale, given(softcap), given(sinks));
  });
}

extern "C" AOTITorchError aoti_torch_cpu_decode_coded_cpu(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle k_cache, AtenTensorHandle k_scales,
    AtenTensorHandle v_cache, AtenTensorHandle v_scales, AtenTensorHandle slot, AtenTensorHandle mask, double scale,
    int64_t key_bits, int64_t value_bits, double* softcap, AtenTensorHandle* sinks, AtenTensorHandle* key_mean,
    AtenTensorHandle* out) {
  return hand_over(out, [&] {
    return decode_coded(q, k, v, k_cache, k_scales, v_cache, v_scales, std::nullopt, slot, mask, scale, key_bits,
                        value_bits, given(softcap), given(sinks), given(key_mean));
  });
}

extern "C" AOTITorchError aoti_torch_cpu_decode_coded_scored_cpu(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle k_cache, AtenTensorHandle k_scales,
    AtenTensorHandle v_cache, AtenTensorHandle v_scales, AtenTensorHandle positions, AtenTensorHandle scores,
    AtenTensorHandle slot, AtenTensorHandle mask, AtenTensorHandle seen, double scale, int64_t key_bits,
    int64_t value_bits, double* softcap, AtenTensorHandle* sinks, AtenTensorHandle* key_mean, AtenTensorHandle* out) {
  return hand_over(out, [&] {
    return decode_coded(q, k, v, k_cache, k_scales, v_cache, v_scales, Scored{positions, scores, seen}, slot, mask,
                        scale, key_bits, value_bits, given(softcap), given(sinks), given(key_mean));
  });
}

extern "C" AOTITorchError aoti_torch_cpu_linear_cpu(AtenTensorHandle x, const AtenTensorHandle* weights,
                                                    int64_t layers, const AtenTensorHandle* biases, int64_t biased,
                                                    AtenTensorHandle* out) {
  return hand_over(out, [&] {
    return linear(x, weights, static_cast<size_t>(layers), biases, static_cast<size_t>(biased));
  });
}

STABLE_TORCH_LIBRARY_IMPL(xkv, CPU, library) {
  library.impl("decode_attention_cpu", TORCH_BOX(&decode_attention_of_tensors));
  library.impl("decode_coded_cpu", TORCH_BOX(&decode_coded_of_tensors));
  library.impl("decode_coded_scored_cpu", TORCH_BOX(&decode_coded_scored_of_tensors));
  library.impl("linear_cpu", TORCH_BOX(&linear_of_tensors));
}
