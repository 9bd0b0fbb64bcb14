// Decode attention of one token a row over the kept slots of a layer, on CPU.
//
// Each kept K/V is read once: the whole query group of a KV head is computed from one pass over its slots. Slots are
// dealt out to threads in chunks, each with its own running softmax (maximum, sum, weighted values); a second, small
// loop merges the chunks. Arithmetic is float32 whatever the dtype of the cache.
//
// Before this text stand lanes.h, and KEY_DIM, VALUE_DIM and GROUP (query heads for each KV head). Shapes are those of
// the op; every tensor but the mask is contiguous.

namespace {

constexpr int64_t CHUNK = 256;  // slots of one task
constexpr int64_t TILE = 64;    // slots between two updates of the running softmax
constexpr int KEY_STEPS = KEY_DIM / STEP, VALUE_STEPS = VALUE_DIM / STEP;
constexpr int AT_ONCE = GROUP <= 3 ? 4 : GROUP <= 6 ? 2 : 1;  // slots whose dot products share a pass over the query
constexpr int CHAINS = GROUP <= 3 ? 2 : 1;                    // slots whose values are summed side by side
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
static_assert(KEY_DIM % STEP == 0 && VALUE_DIM % STEP == 0 && TILE % LANES == 0 && TILE % AT_ONCE == 0 && TILE % CHAINS == 0);

inline float max_of(vec x) {
  float most = x[0];
  for (int i = 1; i < LANES; ++i) most = std::max(most, x[i]);
  return most;
}

// exp for x <= 0, to about 1e-7 of its value: a power of two times a polynomial on [-ln 2 / 2, ln 2 / 2].
inline vec exp_of(vec x) {
  const vec bounded = x < -87.0f ? vec{} - 87.0f : x;
  const vec_int n = __builtin_convertvector(bounded * 1.44269504088896341f - 0.5f, vec_int);
  const vec whole = __builtin_convertvector(n, vec);
  const vec r = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vec_int bits = (n + 127) << 23;
  return x < -87.0f ? vec{} : p * read<vec>(&bits);
}

struct Softmax {  // of one query head over a chunk of slots
  float maximum, sum;
  Pair values[VALUE_STEPS];
};

// Dot products of the group's queries, already scaled, with `count` keys; the next tile's keys are asked for meanwhile.
void dot(const Pair (*q)[KEY_STEPS], const scalar* k, int64_t count, float (*logits)[TILE]) {
  for (int64_t s = 0; s < count; s += LANES) {
    fetch(k + (s + TILE) * KEY_DIM, LANES * KEY_DIM * sizeof(scalar));
    vec sums[GROUP][LANES];
    for (int part = 0; part < LANES; part += AT_ONCE) {
      const scalar* key[AT_ONCE];
      for (int i = 0; i < AT_ONCE; ++i) key[i] = k + std::min(s + part + i, count - 1) * KEY_DIM;
      vec several[GROUP][AT_ONCE] = {};
      for (int d = 0; d < KEY_STEPS; ++d)
        for (int i = 0; i < AT_ONCE; ++i) {
          const Pair keys = load(key[i] + d * STEP);
          for (int g = 0; g < GROUP; ++g) several[g][i] += q[g][d].first * keys.first;
          for (int g = 0; g < GROUP; ++g) several[g][i] += q[g][d].second * keys.second;
        }
      for (int g = 0; g < GROUP; ++g)
        for (int i = 0; i < AT_ONCE; ++i) sums[g][part + i] = several[g][i];
    }
    for (int g = 0; g < GROUP; ++g) {
      const vec eight = sums_of(sums[g]);
      std::memcpy(&logits[g][s], &eight, sizeof eight);
    }
  }
}

// Turns logits into weights relative to the running maximum, and shrinks what was summed under an older maximum.
// Entries from `count` on get weight 0.
void softmax(float* logits, const float* mask, int64_t count, float softcap, Softmax& head) {
  if (softcap > 0.0f)
    for (int64_t s = 0; s < count; ++s) logits[s] = softcap * std::tanh(logits[s] / softcap);
  for (int64_t s = 0; s < count; ++s) logits[s] += mask[s];
  std::fill(logits + count, logits + TILE, NOTHING);
  vec most = vec{} + head.maximum;
  for (int64_t s = 0; s < TILE; s += LANES) {
    const vec x = read<vec>(logits + s);
    most = x > most ? x : most;
  }
  const float maximum = max_of(most);
  vec sum = {};
  for (int64_t s = 0; s < TILE; s += LANES) {
    const vec x = read<vec>(logits + s);
    const vec weight = maximum == NOTHING ? vec{} : exp_of(x - maximum);
    std::memcpy(logits + s, &weight, sizeof weight);
    sum += weight;
  }
  const float shrink = head.maximum == NOTHING ? 0.0f : exp_of(vec{} + (head.maximum - maximum))[0];
  head.maximum = maximum;
  head.sum = head.sum * shrink + sum_of(sum);
  for (Pair& value : head.values) {
    value.first *= shrink;
    value.second *= shrink;
  }
}

// Adds the weighted values of `count` slots to each head of the group, neighbouring slots to sums of their own: one sum
// after the other would wait for the one before.
void add_values(const float (*weights)[TILE], const scalar* v, int64_t count, Softmax* heads) {
  for (int d = 0; d < VALUE_STEPS; ++d) {
    Pair sums[CHAINS][GROUP] = {};
    for (int64_t s = 0; s < count; s += CHAINS) {
      for (int i = 0; i < CHAINS; ++i) {
        const Pair value = load(v + std::min(s + i, count - 1) * VALUE_DIM + d * STEP);
        for (int g = 0; g < GROUP; ++g) {
          sums[i][g].first += weights[g][s + i] * value.first;
          sums[i][g].second += weights[g][s + i] * value.second;
        }
      }
    }
    for (int g = 0; g < GROUP; ++g)
      for (int i = 0; i < CHAINS; ++i) {
        heads[g].values[d].first += sums[i][g].first;
        heads[g].values[d].second += sums[i][g].second;
      }
  }
}

void attend_chunk(const Pair (*q)[KEY_STEPS], const scalar* k, const scalar* v, const scalar* mask, int64_t slots,
                  float softcap, Softmax* heads) {
  for (int g = 0; g < GROUP; ++g) heads[g] = {NOTHING, 0.0f, {}};
  alignas(64) float weights[GROUP][TILE], shown[TILE];
  for (int64_t start = 0; start < slots; start += TILE) {
    const int64_t count = std::min(TILE, slots - start);
    fetch(v + start * VALUE_DIM, count * VALUE_DIM * sizeof(scalar));
    dot(q, k + start * KEY_DIM, count, weights);
    for (int64_t s = 0; s < count; ++s) shown[s] = widen(mask[start + s]);
    for (int g = 0; g < GROUP; ++g) softmax(weights[g], shown, count, softcap, heads[g]);
    add_values(weights, v + start * VALUE_DIM, count, heads);
  }
}

}  // namespace

// `mask_row` and `mask_head` are the mask's strides. Returns 1, with nothing written, for a slot outside the cache.
extern "C" int xkv_decode(const scalar* q, const scalar* k, const scalar* v, scalar* k_cache, scalar* v_cache,
                          const int64_t* slot, const scalar* mask, const float* sinks, scalar* out, int64_t rows,
                          int64_t kv_heads, int64_t slots, int64_t mask_row, int64_t mask_head, float scale,
                          float softcap, int threads) {
  for (int64_t row = 0; row < rows; ++row)
    if (slot[row] < 0 || slot[row] >= slots) return 1;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t head = row * kv_heads; head < (row + 1) * kv_heads; ++head) {
      std::memcpy(k_cache + (head * slots + slot[row]) * KEY_DIM, k + head * KEY_DIM, KEY_DIM * sizeof(scalar));
      std::memcpy(v_cache + (head * slots + slot[row]) * VALUE_DIM, v + head * VALUE_DIM, VALUE_DIM * sizeof(scalar));
    }
  }
  const int64_t heads = rows * kv_heads, chunks = (slots + CHUNK - 1) / CHUNK;
  const std::unique_ptr<Softmax[]> parts(new Softmax[heads * chunks * GROUP]);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < heads * chunks; ++task) {
      const int64_t head = task / chunks, start = task % chunks * CHUNK;
      Pair scaled[GROUP][KEY_STEPS];
      for (int g = 0; g < GROUP; ++g)
        for (int d = 0; d < KEY_STEPS; ++d) {
          const Pair part = load(q + (head * GROUP + g) * KEY_DIM + d * STEP);
          scaled[g][d] = {part.first * scale, part.second * scale};
        }
      attend_chunk(scaled, k_cache + (head * slots + start) * KEY_DIM, v_cache + (head * slots + start) * VALUE_DIM,
                   mask + head / kv_heads * mask_row + head % kv_heads * mask_head + start, std::min(CHUNK, slots - start), softcap,
                   parts.get() + task * GROUP);
    }
#pragma omp for schedule(static)
    for (int64_t query = 0; query < heads * GROUP; ++query) {
      const Softmax* part = parts.get() + query / GROUP * chunks * GROUP + query % GROUP;
      const float sink = sinks == nullptr ? NOTHING : sinks[query % (kv_heads * GROUP)];
      float maximum = sink;
      for (int64_t c = 0; c < chunks; ++c) maximum = std::max(maximum, part[c * GROUP].maximum);
      float sum = sink == NOTHING ? 0.0f : std::exp(sink - maximum);
      float values[VALUE_DIM] = {};
      for (int64_t c = 0; c < chunks; ++c) {
        const Softmax& of = part[c * GROUP];
        const float weight = std::exp(of.maximum - maximum);
        sum += of.sum * weight;
        const float* summed = reinterpret_cast<const float*>(of.values);
        for (int d = 0; d < VALUE_DIM; ++d) values[d] += summed[d] * weight;
      }
      for (int d = 0; d < VALUE_DIM; ++d) out[query * VALUE_DIM + d] = narrow(values[place(d)] / sum);
    }
  }
  return 0;
}
