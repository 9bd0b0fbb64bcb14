// Decode attention of one token a row over the kept slots of a layer, on CPU.
//
// Each kept K/V is read once: the whole query group of a KV head is computed from one pass over its slots. Slots are
// dealt out to threads in chunks, each with its own running softmax (maximum, sum, weighted values); a second, small
// loop merges the chunks. Arithmetic is float32 whatever the dtype of the cache. While the keys of a tile are worked on,
// its values are asked for, and meanwhile the keys of the next: a core must do both at once to be as fast as the memory.
//
// Before this text stand decode.h, lanes.h, softmax.h, and KEY_DIM, VALUE_DIM and GROUP (query heads for each KV head).

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

void* open(const Attention& of, int64_t) {
  return new Buffer<Softmax>(of.heads() * ((of.slots + CHUNK - 1) / CHUNK) * GROUP);
}

void close(void* room) { delete static_cast<Buffer<Softmax>*>(room); }

void attend(const Attention& of, void* room, const Shares& shares, int64_t worker) {
  const int64_t chunks = (of.slots + CHUNK - 1) / CHUNK;
  scalar *k_cache = static_cast<scalar*>(of.k_cache), *v_cache = static_cast<scalar*>(of.v_cache);
  for (int64_t task = shares.first[worker]; task < shares.first[worker + 1]; ++task) {
    const int64_t head = task / chunks, row = head / of.kv_heads, of_row = head % of.kv_heads, place = of.place(head);
    const int64_t start = task % chunks * CHUNK, stop = std::min(start + CHUNK, of.slots);
    const int64_t into = of.slot[row * of.slot_heads + of_row % of.slot_heads], written = head * of.slots + into;
    if (start <= into && into < stop) {
      std::memcpy(k_cache + written * KEY_DIM, of.k.of<scalar>(row, place), KEY_DIM * sizeof(scalar));
      std::memcpy(v_cache + written * VALUE_DIM, of.v.of<scalar>(row, place), VALUE_DIM * sizeof(scalar));
    }
    Queries scaled;
    for (int g = 0; g < GROUP; ++g)
      for (int d = 0; d < KEY_STEPS; ++d) {
        const Pair part = load(of.q.of<scalar>(row, place * GROUP + g) + d * STEP);
        scaled[d][0][g] = part.first * of.scale;
        scaled[d][1][g] = part.second * of.scale;
      }
    attend_chunk(scaled, k_cache + (head * of.slots + start) * KEY_DIM, v_cache + (head * of.slots + start) * VALUE_DIM,
                 static_cast<const scalar*>(of.mask) + row * of.mask_row + of_row * of.mask_head + start, stop - start,
                 of.softcap, static_cast<Buffer<Softmax>*>(room)->at + task * GROUP);
  }
}

void merge(const Attention& of, void* room, const Shares&, int64_t head) {
  const int64_t chunks = (of.slots + CHUNK - 1) / CHUNK, first = of.place(head) * GROUP;
  scalar* out = static_cast<scalar*>(of.out) + head / of.kv_heads * of.out_row;
  for (int64_t query = first; query < first + GROUP; ++query) {
    const Softmax* part = static_cast<Buffer<Softmax>*>(room)->at + head * chunks * GROUP + query - first;
    const float sink = of.sinks == nullptr ? NOTHING : of.sinks[query];
    float maximum = sink;
    for (int64_t c = 0; c < chunks; ++c) maximum = std::max(maximum, part[c * GROUP].running.maximum);
    float sum = sink == NOTHING ? 0.0f : std::exp(sink - maximum);
    float values[VALUE_DIM] = {};
    for (int64_t c = 0; c < chunks; ++c) {
      const Softmax& found = part[c * GROUP];
      const float weight = std::exp(found.running.maximum - maximum);
      sum += found.running.sum * weight;
      const float* summed = reinterpret_cast<const float*>(found.values);
      for (int d = 0; d < VALUE_DIM; ++d) values[d] += summed[d] * weight;
    }
    for (int d = 0; d < VALUE_DIM; ++d) out[query * VALUE_DIM + d] = narrow(values[place(d)] / sum);
  }
}

constexpr DecodeKernel KERNEL{CHUNK, (KEY_DIM + VALUE_DIM) * sizeof(scalar), open, attend, merge, close};

}  // namespace

extern "C" const DecodeKernel* xkv_decode() { return &KERNEL; }
