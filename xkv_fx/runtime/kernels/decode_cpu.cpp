// Decode attention of one token a row over the kept slots of a layer, on CPU.
//
// Each kept K/V is read once: the whole query group of a KV head is computed from one pass over its slots. Slots are
// dealt out to threads in chunks, each with its own running softmax (maximum, sum, weighted values); a second, small
// loop merges the chunks. Arithmetic is float32 whatever the dtype of the cache. While the keys of a tile are worked on,
// its values are asked for, and meanwhile the keys of the next: a core must do both at once to be as fast as the memory.
//
// Before this text stand lanes.h, softmax.h, and KEY_DIM, VALUE_DIM and GROUP (query heads for each KV head). Shapes are those of
// the op; every tensor but the mask is contiguous.

namespace {

constexpr int KEY_STEPS = KEY_DIM / STEP, VALUE_STEPS = VALUE_DIM / STEP;
constexpr int AT_ONCE = GROUP <= 2 ? 4 : GROUP <= 6 ? 2 : 1;  // slots whose dot products share a pass over the query
constexpr int CHAINS = GROUP <= 3 ? 2 : 1;                    // slots whose values are summed side by side
static_assert(KEY_DIM % STEP == 0 && VALUE_DIM % STEP == 0 && TILE % LANES == 0 && LANES % AT_ONCE == 0);

struct Softmax {  // of one query head over a chunk of slots
  Running running;
  Pair values[VALUE_STEPS];
};

// The queries of a group, already scaled: in each step the first halves of all, then the second.
using Queries = vec[KEY_STEPS][2][GROUP];

// Dot products of the group's queries with COUNT neighbouring keys: sums that are still to be added up, `apart` vectors
// from one head to the next.
template <int COUNT>
inline void dot_keys(const Queries& q, const scalar* k, vec* parts, int64_t apart) {
  vec sums[COUNT][GROUP] = {};
#pragma GCC unroll 4
  for (int d = 0; d < KEY_STEPS; ++d) add_step<GROUP, COUNT>(q[d][0], k + d * STEP, KEY_DIM, sums);
  for (int g = 0; g < GROUP; ++g)
    for (int i = 0; i < COUNT; ++i) parts[g * apart + i] = sums[i][g];
}

// Dot products of the group's queries with `count` keys; the tile's values are asked for meanwhile.
void dot(const Queries& q, const scalar* k, const scalar* v, int64_t count, float (*logits)[TILE]) {
  for (int64_t s = 0; s < count; s += LANES) {
    fetch(v + s * VALUE_DIM, LANES * VALUE_DIM * sizeof(scalar));
    vec parts[GROUP][LANES];
    if (s + LANES <= count) {
      for (int i = 0; i < LANES; i += AT_ONCE) dot_keys<AT_ONCE>(q, k + (s + i) * KEY_DIM, &parts[0][i], LANES);
    } else {
      std::memset(parts, 0, sizeof parts);
      for (int64_t i = 0; i < count - s; ++i) dot_keys<1>(q, k + (s + i) * KEY_DIM, &parts[0][i], LANES);
    }
    for (int g = 0; g < GROUP; ++g) {
      const vec eight = sums_of(parts[g]);
      std::memcpy(&logits[g][s], &eight, sizeof eight);
    }
  }
}

// Adds the weighted values of COUNT slots, each to sums of its own: one sum after the other would wait for the one before.
template <int COUNT>
inline void add_slots(const float (*weights)[TILE], const scalar* v, int64_t s, Pair (*sums)[GROUP]) {
  for (int i = 0; i < COUNT; ++i) {
    const Pair value = load(v + (s + i) * VALUE_DIM);
    for (int g = 0; g < GROUP; ++g) {
      const float weight = weights[g][s + i];
      sums[i][g].first += weight * value.first;
      sums[i][g].second += weight * value.second;
    }
  }
}

// Adds the weighted values of `count` slots to each head of the group; the next tile's keys are asked for meanwhile.
void add_values(const float (*weights)[TILE], const scalar* v, const scalar* next_k, int64_t count, Softmax* heads) {
  constexpr int64_t ASKED = CHAINS * KEY_DIM * sizeof(scalar) / VALUE_STEPS;
  const char* ahead = reinterpret_cast<const char*>(next_k);
  for (int d = 0; d < VALUE_STEPS; ++d) {
    Pair sums[CHAINS][GROUP] = {};
    int64_t s = 0;
    for (; s + CHAINS <= count; s += CHAINS, ahead += ASKED) {
      fetch(ahead, ASKED);
      add_slots<CHAINS>(weights, v + d * STEP, s, sums);
    }
    for (; s < count; ++s) add_slots<1>(weights, v + d * STEP, s, sums);
    for (int g = 0; g < GROUP; ++g)
      for (int i = 0; i < CHAINS; ++i) {
        heads[g].values[d].first += sums[i][g].first;
        heads[g].values[d].second += sums[i][g].second;
      }
  }
}

void attend_chunk(const Queries& q, const scalar* k, const scalar* v, const scalar* mask, int64_t slots,
                  float softcap, Softmax* heads) {
  for (int g = 0; g < GROUP; ++g) heads[g] = {{NOTHING, 0.0f}, {}};
  alignas(64) float weights[GROUP][TILE], shown[TILE];
  for (int64_t start = 0; start < slots; start += TILE) {
    const int64_t count = std::min(TILE, slots - start);
    dot(q, k + start * KEY_DIM, v + start * VALUE_DIM, count, weights);
    show(mask + start, count, TILE, shown);
    for (int g = 0; g < GROUP; ++g) {
      const float shrink = softmax(weights[g], shown, count, TILE, softcap, heads[g].running);
      if (shrink == 1.0f) continue;
      for (Pair& value : heads[g].values) {
        value.first *= shrink;
        value.second *= shrink;
      }
    }
    add_values(weights, v + start * VALUE_DIM, k + (start + count) * KEY_DIM, count, heads);
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
  const Buffer<Softmax> parts(heads * chunks * GROUP);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < heads * chunks; ++task) {
      const int64_t head = task / chunks, start = task % chunks * CHUNK;
      Queries scaled;
      for (int g = 0; g < GROUP; ++g)
        for (int d = 0; d < KEY_STEPS; ++d) {
          const Pair part = load(q + (head * GROUP + g) * KEY_DIM + d * STEP);
          scaled[d][0][g] = part.first * scale;
          scaled[d][1][g] = part.second * scale;
        }
      attend_chunk(scaled, k_cache + (head * slots + start) * KEY_DIM, v_cache + (head * slots + start) * VALUE_DIM,
                   mask + head / kv_heads * mask_row + head % kv_heads * mask_head + start, std::min(CHUNK, slots - start), softcap,
                   parts.at + task * GROUP);
    }
#pragma omp for schedule(static)
    for (int64_t query = 0; query < heads * GROUP; ++query) {
      const Softmax* part = parts.at + query / GROUP * chunks * GROUP + query % GROUP;
      const float sink = sinks == nullptr ? NOTHING : sinks[query % (kv_heads * GROUP)];
      float maximum = sink;
      for (int64_t c = 0; c < chunks; ++c) maximum = std::max(maximum, part[c * GROUP].running.maximum);
      float sum = sink == NOTHING ? 0.0f : std::exp(sink - maximum);
      float values[VALUE_DIM] = {};
      for (int64_t c = 0; c < chunks; ++c) {
        const Softmax& of = part[c * GROUP];
        const float weight = std::exp(of.running.maximum - maximum);
        sum += of.running.sum * weight;
        const float* summed = reinterpret_cast<const float*>(of.values);
        for (int d = 0; d < VALUE_DIM; ++d) values[d] += summed[d] * weight;
      }
      for (int d = 0; d < VALUE_DIM; ++d) out[query * VALUE_DIM + d] = narrow(values[place(d)] / sum);
    }
  }
  return 0;
}
