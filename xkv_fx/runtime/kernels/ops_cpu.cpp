// The CPU kernels as operators. Python's part of a call costs 20 us, which a decode step would pay for every layer.
//
// Kernels are built for dtypes and shapes, and loaded one by one; whoever loads one hands it in here. Those for attention
// are called side by side: the blocks of all caches of a layer are dealt out to threads at once.
//
// Before this text stands decode.h.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
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
using FindDecode = const DecodeKernel* (*)();
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

// KV heads that are cached alike, and what kernel attends to them.
class Heads {
  std::vector<Dense> kept;  // copies that the kernel reads
  Dense& read(Lent x, bool as_it_lies) { return kept.emplace_back(x, as_it_lies); }
  const void* dense(Lent x) { return read(x, x.is_contiguous()).seen.data(); }

 public:
  const DecodeKernel* kernel;
  Attention asked{};
  std::vector<int64_t> first;  // block of each worker
  std::vector<int64_t> share;  // of each thread, the worker that it is here; -1 for none
  void* room = nullptr;

  Heads(const DecodeKernel* by) : kernel(by) { kept.reserve(8); }
  Heads(Heads&& other)
      : kept(std::move(other.kept)), kernel(other.kernel), asked(other.asked), first(std::move(other.first)),
        share(std::move(other.share)), room(std::exchange(other.room, nullptr)) {}
  ~Heads() {
    if (room != nullptr) kernel->close(room);
  }

  static Vectors vectors(const Dense& x) { return {x.seen.data(), x.seen.strides()[0], x.seen.strides()[1]}; }

  // Without scales for slots in the dtype.
  void caches(const Lent& k, const Lent* k_scales, const Lent& v, const Lent* v_scales) {
    for (const Lent* held : {&k, k_scales, &v, v_scales})
      STD_TORCH_CHECK(held == nullptr || held->is_contiguous(), "the caches must be contiguous");
    asked.k_cache = k.data(), asked.v_cache = v.data();
    if (k_scales != nullptr) asked.k_scales = k_scales->data(), asked.v_scales = v_scales->data();
    asked.rows = k.sizes()[0], asked.kv_heads = k.sizes()[1], asked.slots = k.sizes()[2];
  }
  void at(Lent slot, Lent mask) {
    asked.slot = static_cast<const int64_t*>(dense(slot));
    asked.slot_heads = slot.numel() / asked.rows;
    for (int64_t i = 0; i < asked.rows * asked.slot_heads; ++i)
      STD_TORCH_CHECK(asked.slot[i] >= 0 && asked.slot[i] < asked.slots, "a slot lies outside the ", asked.slots,
                      " slots of the cache");
    const Lent shown = read(mask, mask.strides()[3] == 1).seen;
    asked.mask = shown.data();
    asked.mask_row = shown.strides()[0], asked.mask_head = mask.sizes()[1] == 1 ? 0 : shown.strides()[1];
  }
  void mean_keys(Lent x) {
    STD_TORCH_CHECK(x.dtype() == aoti_torch_dtype_float32(), "mean keys must be float32");
    asked.key_mean = static_cast<const float*>(dense(x));
  }
  void scored(Lent positions, Lent scores, Lent seen) {
    STD_TORCH_CHECK(positions.is_contiguous() && positions.dtype() == aoti_torch_dtype_int32(),
                    "the positions must be contiguous int32");
    STD_TORCH_CHECK(scores.is_contiguous() && scores.dtype() == aoti_torch_dtype_float32(),
                    "the scores must be contiguous float32");
    asked.positions = static_cast<int32_t*>(positions.data());
    asked.scores = static_cast<float*>(scores.data());
    asked.seen = static_cast<const int64_t*>(dense(seen));
  }

  int64_t blocks() const { return asked.heads() * kernel->blocks(asked.slots); }
  int64_t cost() const { return blocks() * kernel->block * kernel->slot_bytes; }

  // Takes the blocks that lie from `from` bytes of the layer's on: each of `threads` threads gets those of its `total / threads`.
  void deal(int64_t from, int64_t total, int64_t threads) {
    const int64_t each = kernel->block * kernel->slot_bytes;
    share.assign(threads, -1);
    first.assign(1, 0);
    for (int64_t thread = 0; thread < threads; ++thread) {
      const int64_t end = thread + 1 == threads ? blocks() : ((thread + 1) * total / threads - from) / each;
      if (std::min(end, blocks()) <= first.back()) continue;
      share[thread] = static_cast<int64_t>(first.size()) - 1;
      first.push_back(std::min(end, blocks()));
    }
    room = kernel->open(asked, shares().workers);
  }
  Shares shares() const { return {first.data(), static_cast<int64_t>(first.size()) - 1}; }
};

const DecodeKernel* decode_kernel(int32_t dtype, int64_t group, int64_t key_dim, int64_t value_dim, int64_t key_bits,
                                  int64_t value_bits) {
  return reinterpret_cast<FindDecode>(kernel(dtype, group, key_dim, value_dim, false, key_bits, value_bits))();
}

// What all heads of a layer are asked, and what they answer.
class Layer {
  const Dense q, k, v;
  std::optional<Dense> sinks;
  float scale, softcap;
  Made out;
  std::vector<Heads> caches;

  static bool as_rows(Lent x) { return x.strides()[3] == 1; }

 public:
  Layer(Lent q, Lent k, Lent v, double scale, std::optional<double> softcap, std::optional<Lent> of_sinks)
      : q(q, as_rows(q)), k(k, as_rows(k)), v(v, as_rows(v)), scale(static_cast<float>(scale)),
        softcap(static_cast<float>(softcap.value_or(0.0))),
        out(q.dtype(), std::array{q.sizes()[0], q.sizes()[1], q.sizes()[2], v.sizes()[3]}) {
    if (!of_sinks.has_value()) return;
    STD_TORCH_CHECK(of_sinks->dtype() == aoti_torch_dtype_float32(), "sink logits must be float32");
    sinks.emplace(*of_sinks);
  }

  // A cache of some of the layer's KV heads, which stand at these places among them; all of them without.
  Heads& cache(int64_t key_bits, int64_t value_bits, const int64_t* places) {
    const int64_t *asked = q.seen.sizes(), group = asked[1] / k.seen.sizes()[1];
    Heads& made = caches.emplace_back(
        decode_kernel(q.seen.dtype(), group, asked[3], v.seen.sizes()[3], key_bits, value_bits));
    Attention& of = made.asked;
    of.q = Heads::vectors(q), of.k = Heads::vectors(k), of.v = Heads::vectors(v);
    of.out = out.data(), of.out_row = asked[1] * v.seen.sizes()[3];
    of.places = places;
    of.sinks = sinks.has_value() ? static_cast<const float*>(sinks->seen.data()) : nullptr;
    of.scale = scale, of.softcap = softcap;
    return made;
  }

  Made attended() {
    const int64_t workers = threads();
    int64_t total = 0, from = 0, heads = 0;
    for (const Heads& each : caches) total += each.cost(), heads += each.asked.heads();
    for (Heads& each : caches) {
      each.deal(from, total, workers);
      from += each.cost();
    }
#pragma omp parallel num_threads(workers)
    {
#pragma omp for schedule(static, 1)
      for (int64_t worker = 0; worker < workers; ++worker)
        for (const Heads& each : caches)
          if (each.share[worker] >= 0) each.kernel->attend(each.asked, each.room, each.shares(), each.share[worker]);
#pragma omp for schedule(static)
      for (int64_t number = 0; number < heads; ++number) {
        auto each = caches.begin();
        int64_t head = number;
        for (; head >= each->asked.heads(); ++each) head -= each->asked.heads();
        each->kernel->merge(each->asked, each->room, each->shares(), head);
      }
    }
    return std::move(out);
  }
};

Made decode_attention(Lent q, Lent k, Lent v, Lent k_cache, Lent v_cache, Lent slot, Lent mask, double scale,
                      std::optional<double> softcap, std::optional<Lent> sinks) {
  Layer layer(q, k, v, scale, softcap, sinks);
  Heads& heads = layer.cache(0, 0, nullptr);
  heads.caches(k_cache, nullptr, v_cache, nullptr);
  heads.at(slot, mask);
  return layer.attended();
}

// What eviction by score reads and changes besides.
struct Scored {
  Lent positions, scores, seen;
};

Made decode_coded(Lent q, Lent k, Lent v, Lent k_cache, Lent k_scales, Lent v_cache, Lent v_scales,
                  std::optional<Scored> scored, Lent slot, Lent mask, double scale, int64_t key_bits, int64_t value_bits,
                  std::optional<double> softcap, std::optional<Lent> sinks, std::optional<Lent> key_mean) {
  Layer layer(q, k, v, scale, softcap, sinks);
  Heads& heads = layer.cache(key_bits, value_bits, nullptr);
  heads.caches(k_cache, &k_scales, v_cache, &v_scales);
  heads.at(slot, mask);
  if (key_mean.has_value()) heads.mean_keys(*key_mean);
  if (scored.has_value()) heads.scored(scored->positions, scored->scores, scored->seen);
  return layer.attended();
}

template <typename Each>
struct List {  // `Each` is a handle, or has one
  const Each* at;
  size_t size;
  size_t taken = 0;
  Lent next() {
    STD_TORCH_CHECK(taken < size, "there are too few tensors for these caches");
    return Lent(at[taken++]);
  }
};

// Several caches of a layer at once: see `decode_heads_cpu` in decode_heads_cpu.py.
template <typename Each>
Made decode_heads(Lent q, Lent k, Lent v, List<Each> buffers, List<Each> slots, List<Each> masks, const int64_t* places,
                  int64_t placed, const int64_t* bits, int64_t counted, double scale, std::optional<double> softcap,
                  std::optional<Lent> sinks, List<Each> means) {
  Layer layer(q, k, v, scale, softcap, sinks);
  std::vector<bool> cached(k.sizes()[1]);
  int64_t taken = 0;
  for (int64_t i = 0; i + 1 < counted; i += 2) {
    const bool coded = bits[i] != 0 || bits[i + 1] != 0;
    Heads& heads = layer.cache(bits[i], bits[i + 1], places + taken);
    const Lent k_cache = buffers.next();
    std::optional<Lent> k_scales, v_scales;
    if (coded) k_scales = buffers.next();
    const Lent v_cache = buffers.next();
    if (coded) v_scales = buffers.next();
    heads.caches(k_cache, coded ? &*k_scales : nullptr, v_cache, coded ? &*v_scales : nullptr);
    taken += heads.asked.kv_heads;
    STD_TORCH_CHECK(taken <= placed, "there are too few places for these caches");
    for (int64_t at = taken - heads.asked.kv_heads; at < taken; ++at) {
      STD_TORCH_CHECK(places[at] >= 0 && places[at] < k.sizes()[1] && !cached[places[at]],
                      "each KV head of the layer must have one cache");
      cached[places[at]] = true;
    }
    heads.at(slots.next(), masks.next());
    if (coded && means.size > 0) heads.mean_keys(means.next());
  }
  STD_TORCH_CHECK(taken == k.sizes()[1], "each KV head of the layer must have one cache");
  return layer.attended();
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

Tensor decode_heads_of_tensors(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<Tensor>& buffers,
                               const std::vector<Tensor>& slots, const std::vector<Tensor>& masks,
                               const std::vector<int64_t>& places, const std::vector<int64_t>& bits, double scale,
                               std::optional<double> softcap, const std::optional<Tensor>& sinks,
                               const std::vector<Tensor>& means) {
  const auto list = [](const std::vector<Tensor>& of) { return List<Tensor>{of.data(), of.size()}; };
  return Tensor(decode_heads(q, k, v, list(buffers), list(slots), list(masks), places.data(),
                             static_cast<int64_t>(places.size()), bits.data(), static_cast<int64_t>(bits.size()), scale,
                             softcap, lent(sinks), list(means))
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

extern "C" AOTITorchError aoti_torch_cpu_decode_heads_cpu(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, const AtenTensorHandle* buffers, int64_t buffer_count,
    const AtenTensorHandle* slots, int64_t slot_count, const AtenTensorHandle* masks, int64_t mask_count,
    const int64_t* places, int64_t placed, const int64_t* bits, int64_t counted, double scale, double* softcap,
    AtenTensorHandle* sinks, const AtenTensorHandle* means, int64_t mean_count, AtenTensorHandle* out) {
  const auto list = [](const AtenTensorHandle* of, int64_t count) {
    return List<AtenTensorHandle>{of, static_cast<size_t>(count)};
  };
  return hand_over(out, [&] {
    return decode_heads(Lent(q), Lent(k), Lent(v), list(buffers, buffer_count), list(slots, slot_count),
                        list(masks, mask_count), places, placed, bits, counted, scale, given(softcap), given(sinks),
                        list(means, mean_count));
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
  library.impl("decode_heads_cpu", TORCH_BOX(&decode_heads_of_tensors));
  library.impl("linear_cpu", TORCH_BOX(&linear_of_tensors));
}
