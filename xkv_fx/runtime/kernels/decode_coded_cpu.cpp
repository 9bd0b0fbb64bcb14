// Decode attention of one token a row over slots of fewer bits, on CPU.
//
// As decode_cpu.cpp, but what is read are codes. A group of elements shares a scale and a zero, so that its part of a logit
// is scale * sum(q * code) + zero * sum(q), and its part of the output is sum(weight * scale * code) + sum(weight * zero):
// codes are multiplied as they are, in quads (quads.h). Codes are of rotated vectors: queries are rotated first, outputs
// last.
//
// The slots of all heads are dealt out to threads evenly, in blocks. What a thread has of one head makes a part, with a
// running softmax over its runs of blocks; parts are merged at the end.
//
// Before this text stand decode.h, lanes.h, softmax.h, codes.h, quads.h, and KEY_DIM, VALUE_DIM, GROUP (query heads for each
// KV head), KEY_BITS and VALUE_BITS (8, 4, or 0 for the dtype itself), KEY_SPAN and VALUE_SPAN (elements that share a
// scale).

namespace {

constexpr int64_t RUN = CHUNK;  // slots between two updates of the running softmax
static_assert(RUN % BLOCK == 0);

// Keys or values as slots hold them.
template <int BITS, int DIM, int OF_SCALE>
struct Stored {
  static constexpr bool IN_CODES = true;
  static constexpr float MIDDLE = ((1 << BITS) - 1) / 2.0f;  // of codes
  static constexpr int CODE_BITS = BITS, SIZE = DIM, SPAN = OF_SCALE, SPANS = DIM / SPAN;
  static constexpr int OF_SPAN = (SPAN + LANES - 1) / LANES;  // vectors
  static constexpr int ROW = Layout<BITS, DIM>::ROW;          // elements in memory
  static constexpr int SCALES = 2 * SPANS;                    // of a slot, zeros included
  using element = uint8_t;
  static_assert(SPAN % 8 == 0 && SPAN <= BLOCK && DIM % SPAN == 0);
};

template <int DIM, int OF_SCALE>
struct Stored<0, DIM, OF_SCALE> {
  static constexpr bool IN_CODES = false;
  static constexpr int SIZE = DIM, SPAN = DIM, SPANS = 1, OF_SPAN = DIM / LANES, ROW = DIM, SCALES = 0;
  using element = scalar;
  static_assert(DIM % LANES == 0);
};

using Keys = Stored<KEY_BITS, KEY_DIM, KEY_SPAN>;
using Values = Stored<VALUE_BITS, VALUE_DIM, VALUE_SPAN>;
constexpr int VECTORS = Values::SPANS * Values::OF_SPAN;  // of an output

// Sums are kept in registers: so many vectors of them.
constexpr int SUMS = LANES == 16 ? 24 : WORDS == 1 ? 12 : 8;
constexpr int at_most(int number, int most) { return number < most ? number : most; }
constexpr int at_least_one(int number) { return number < 1 ? 1 : number; }

struct Asked {  // the rotated and scaled queries of a group
#if KEY_BITS
  Digits<KEY_DIM> digits[GROUP];  // of whole numbers, and what one stands for
  float unit[GROUP], sums[GROUP][Keys::SPANS], rest[GROUP][Keys::SPANS];
#else
  vec q[KEY_DIM / LANES][GROUP];
#endif
  float mean[GROUP];  // what the subtracted mean key would have added to each logit
};

struct Softmax {  // of one query head over some of its slots
  Running running;
  vec values[VECTORS];
  float zeros[Values::SPANS];
};

// What a run of slots is turned into on its way.
struct Room {
  alignas(64) float weights[GROUP][RUN], shown[RUN];
  alignas(64) float scale[Keys::SPANS > Values::SPANS ? Keys::SPANS : Values::SPANS][RUN];
  alignas(64) float zero[Keys::SPANS > Values::SPANS ? Keys::SPANS : Values::SPANS][RUN];
#if KEY_BITS
  alignas(64) uint32_t keys[KEY_DIM / 4][BLOCK];
#endif
#if VALUE_BITS
  alignas(64) uint32_t values[BLOCK / 4][PADDED<VALUE_DIM>];
  alignas(64) Digits<RUN> digits[GROUP][Values::SPANS];
#endif
  uint8_t filled_up[LANES * (KEY_DIM > VALUE_DIM ? KEY_DIM : VALUE_DIM)];
};

// `apart` elements from one query of the group to the next.
void ask(const scalar* q, int64_t apart, const float* mean, float scale, Asked& asked) {
  for (int g = 0; g < GROUP; ++g) {
    float x[PADDED<KEY_DIM>] = {}, of_mean = 0.0f;
    for (int d = 0; d < KEY_DIM; ++d) x[d] = widen(q[g * apart + d]) * scale;
    if (mean != nullptr)
      for (int d = 0; d < KEY_DIM; ++d) of_mean += x[d] * mean[d];
    asked.mean[g] = of_mean;
#if KEY_BITS
    rotate<KEY_DIM>(x);
    for (int j = 0; j < Keys::SPANS; ++j) {
      asked.sums[g][j] = 0.0f;
      for (int d = 0; d < KEY_SPAN; ++d) asked.sums[g][j] += x[j * KEY_SPAN + d];
    }
    std::memset(x + KEY_DIM, 0, sizeof x - KEY_DIM * sizeof *x);
    vec most = {};
    for (int d = 0; d < KEY_DIM; d += LANES) most = larger(larger(read<vec>(x + d), -read<vec>(x + d)), most);
    const float largest = max_of(most), wholes = largest > 0.0f ? LARGEST / largest : 0.0f;
    asked.unit[g] = largest / LARGEST;
    for (int d = 0; d < KEY_DIM; d += LANES) {
      const vec rest = put_digits(read<vec>(x + d) * wholes, d, asked.digits[g]);
      std::memcpy(x + d, &rest, sizeof rest);
    }
    for (int j = 0; j < Keys::SPANS; ++j) {
      asked.rest[g][j] = 0.0f;
      for (int d = 0; d < KEY_SPAN; ++d) asked.rest[g][j] += x[j * KEY_SPAN + d] * (Keys::MIDDLE * asked.unit[g]);
    }
#else
    for (int i = 0; i < KEY_DIM / LANES; ++i) asked.q[i][g] = read<vec>(x + i * LANES);
#endif
  }
}

// Hands each block of `count` slots to `use`, as codes of a multiple of LANES slots.
template <typename Stored, typename Use>
inline void each_block(const uint8_t* codes, int64_t count, Room& room, Use use) {
  const int64_t whole = count / LANES * LANES;
  for (int64_t s = 0; s < whole; s += BLOCK) use(s, std::min(BLOCK, whole - s), codes + s * Stored::ROW);
  if (whole == count) return;
  std::memcpy(room.filled_up, codes + whole * Stored::ROW, (count - whole) * Stored::ROW);
  use(whole, static_cast<int64_t>(LANES), room.filled_up);
}

#if KEY_BITS

constexpr int KEY_HEADS = at_most(GROUP, at_least_one(SUMS / DIGITS));
constexpr int KEY_VECTORS = KEY_HEADS * DIGITS * 4 <= SUMS ? 4 : KEY_HEADS * DIGITS * 2 <= SUMS ? 2 : 1;

// Logits of COUNT * LANES slots: the block's from `in_block` on, the run's from `s` on. Memory from `ahead` on is asked for.
template <int COUNT, int FIRST = 0>
inline void dot_codes(const Asked& asked, Room& room, int64_t in_block, int64_t s, const char* ahead) {
  constexpr int HEADS = at_most(KEY_HEADS, GROUP - FIRST);
  constexpr int64_t EACH = FIRST ? 0 : COUNT * LANES * Values::ROW * sizeof(Values::element) * 4 / KEY_DIM;
  vec sums[COUNT][HEADS];
  for (int c = 0; c < COUNT; ++c)
    for (int h = 0; h < HEADS; ++h) sums[c][h] = vec{} + asked.mean[FIRST + h];
  for (int j = 0; j < Keys::SPANS; ++j) {
    vec_sum parts[COUNT][HEADS][DIGITS] = {};
    for (int i = j * KEY_SPAN / 4; i < (j + 1) * KEY_SPAN / 4; ++i, ahead += EACH) {
      fetch(ahead, EACH);
#pragma GCC unroll 4
      for (int w = 0; w < WORDS; ++w) {
        vec_sum codes[COUNT];
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; ++c) codes[c] = part_of(read_quads(room.keys[i] + in_block + c * LANES), w);
#pragma GCC unroll 24
        for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 3
          for (int d = 0; d < DIGITS; ++d)
#pragma GCC unroll 4
            for (int c = 0; c < COUNT; ++c)
              multiply_add(parts[c][h][d], codes[c], asked.digits[FIRST + h][d][i * APART + w]);
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < COUNT; ++c) {
      const vec scale = read<vec>(room.scale[j] + s + c * LANES), zero = read<vec>(room.zero[j] + s + c * LANES);
#pragma GCC unroll 24
      for (int h = 0; h < HEADS; ++h)
        sums[c][h] += (sum_of_digits(parts[c][h]) * asked.unit[FIRST + h] + asked.rest[FIRST + h][j]) * scale +
                      zero * asked.sums[FIRST + h][j];
    }
  }
  for (int c = 0; c < COUNT; ++c)
    for (int h = 0; h < HEADS; ++h) std::memcpy(room.weights[FIRST + h] + s + c * LANES, &sums[c][h], sizeof(vec));
  if constexpr (FIRST + HEADS < GROUP) dot_codes<COUNT, FIRST + HEADS>(asked, room, in_block, s, ahead);
}

// Logits of a run's `count` keys; the run's values are asked for meanwhile.
void dot(const Asked& asked, const Keys::element* k, const uint16_t* k_scales, const Values::element* v,
         const uint16_t* v_scales, int64_t count, Room& room) {
  read_scales<Keys::SPANS>(k_scales, count, room.scale, room.zero);
  each_block<Keys>(k, count, room, [&](int64_t start, int64_t slots, const uint8_t* codes) {
    fetch(v_scales + start * Values::SCALES, slots * Values::SCALES * sizeof *v_scales);
    by_slot<KEY_BITS, KEY_DIM>(codes, slots, room.keys);
    constexpr int AT_ONCE = KEY_VECTORS * LANES;
    int64_t s = 0;
    const auto ahead = [&] { return reinterpret_cast<const char*>(v + (start + s) * Values::ROW); };
    for (; s + AT_ONCE <= slots; s += AT_ONCE) dot_codes<KEY_VECTORS>(asked, room, s, start + s, ahead());
    for (; s < slots; s += LANES) dot_codes<1>(asked, room, s, start + s, ahead());
  });
}

#else

// Logits of LANES keys in the dtype from `s` on, of which there are `count`.
template <int AT_ONCE, int FIRST = 0>
inline void dot_numbers(const Asked& asked, const scalar* k, int64_t count, Room& room, int64_t s) {
  constexpr int HEADS = at_most(at_least_one(SUMS / AT_ONCE), GROUP - FIRST);
  vec parts[HEADS][LANES] = {};
  for (int64_t n = 0; n < LANES && s + n < count; n += AT_ONCE) {
    vec sums[AT_ONCE][HEADS] = {};
    for (int i = 0; i < KEY_DIM / LANES; ++i)
#pragma GCC unroll 24
      for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 4
        for (int c = 0; c < AT_ONCE; ++c)
          sums[c][h] += asked.q[i][FIRST + h] * widen_lanes(k + (s + n + c) * KEY_DIM + i * LANES);
    for (int h = 0; h < HEADS; ++h)
      for (int c = 0; c < AT_ONCE; ++c) parts[h][n + c] = sums[c][h];
  }
  for (int h = 0; h < HEADS; ++h) {
    const vec several = sums_of(parts[h]) + asked.mean[FIRST + h];
    std::memcpy(room.weights[FIRST + h] + s, &several, sizeof several);
  }
  if constexpr (FIRST + HEADS < GROUP) dot_numbers<AT_ONCE, FIRST + HEADS>(asked, k, count, room, s);
}

// Logits of a run's `count` keys; the run's values are asked for meanwhile.
void dot(const Asked& asked, const Keys::element* k, const uint16_t*, const Values::element* v, const uint16_t* v_scales,
         int64_t count, Room& room) {
  for (int64_t s = 0; s < count; s += LANES) {
    fetch(v + s * Values::ROW, LANES * Values::ROW * sizeof *v);
    fetch(v_scales + s * Values::SCALES, LANES * Values::SCALES * sizeof *v_scales);
    if (s + LANES <= count) dot_numbers<GROUP * 4 <= SUMS ? 4 : 2>(asked, k, count, room, s);
    else dot_numbers<1>(asked, k, count, room, s);
  }
}

#endif

#if VALUE_BITS

constexpr int VALUE_HEADS = at_most(GROUP, at_least_one(SUMS / DIGITS));
constexpr int VALUES_AT_ONCE = at_least_one(SUMS / (VALUE_HEADS * DIGITS));

// Adds the weighted codes of the block's 4 * `fours` slots, the run's from `s` on. Memory from `ahead` on is asked for.
template <int VECTOR = 0, int HEAD = 0>
inline void add_codes(const Room& room, const float* unit, int64_t s, int64_t fours, const char* ahead, Softmax* heads) {
  constexpr int SPAN = VECTOR / Values::OF_SPAN, IN_SPAN = VECTOR % Values::OF_SPAN;
  constexpr int COUNT = at_most(VALUES_AT_ONCE, Values::OF_SPAN - IN_SPAN), HEADS = at_most(VALUE_HEADS, GROUP - HEAD);
  constexpr int64_t EACH = HEAD ? 0 : 4 * Keys::ROW * sizeof(Keys::element) * COUNT / VECTORS;
  vec_sum sums[COUNT][HEADS][DIGITS] = {};
  for (int64_t n = 0; n < fours; ++n, ahead += EACH) {
    fetch(ahead, EACH);
#pragma GCC unroll 4
    for (int w = 0; w < WORDS; ++w) {
      vec_sum codes[COUNT];
#pragma GCC unroll 24
      for (int i = 0; i < COUNT; ++i)
        codes[i] = part_of(read_quads(room.values[n] + SPAN * VALUE_SPAN + (IN_SPAN + i) * LANES), w);
#pragma GCC unroll 24
      for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 3
        for (int d = 0; d < DIGITS; ++d)
#pragma GCC unroll 24
          for (int i = 0; i < COUNT; ++i)
            multiply_add(sums[i][h][d], codes[i], room.digits[HEAD + h][SPAN][d][(s / 4 + n) * APART + w]);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 24
    for (int h = 0; h < HEADS; ++h) heads[HEAD + h].values[VECTOR + i] += sum_of_digits(sums[i][h]) * unit[SPAN];
  if constexpr (HEAD + HEADS < GROUP) add_codes<VECTOR, HEAD + HEADS>(room, unit, s, fours, ahead, heads);
  else if constexpr (VECTOR + COUNT < VECTORS) add_codes<VECTOR + COUNT>(room, unit, s, fours, ahead, heads);
}

// Weights of `count` slots times scales, as whole numbers for each span of elements; the zeros are added up here. A weight
// is at most 1, so that the largest scale says what a whole number stands for.
inline void weigh(int64_t count, Room& room, float* unit, Softmax* heads) {
  for (int j = 0; j < Values::SPANS; ++j) {
    vec most = {};
    for (int64_t s = 0; s < count; s += LANES) most = larger(read<vec>(room.scale[j] + s), most);
    const float largest = max_of(most), wholes = largest > 0.0f ? LARGEST / largest : 0.0f;
    unit[j] = largest / LARGEST;
    vec zeros[GROUP] = {}, rests[GROUP] = {};
    for (int64_t s = 0; s < count; s += LANES) {
      const vec scale = read<vec>(room.scale[j] + s) * wholes, zero = read<vec>(room.zero[j] + s);
      for (int g = 0; g < GROUP; ++g) {
        const vec weight = read<vec>(room.weights[g] + s);
        rests[g] += put_digits(weight * scale, s, room.digits[g][j]);
        zeros[g] += weight * zero;
      }
    }
    for (int g = 0; g < GROUP; ++g) heads[g].zeros[j] += sum_of(zeros[g] + rests[g] * (Values::MIDDLE * unit[j]));
  }
}

// Adds the weighted values of a run's `count` slots to each head of the group; what comes next is asked for meanwhile.
void add(Room& room, const Values::element* v, const uint16_t* v_scales, int64_t count, const Keys::element* next,
         const uint16_t* next_scales, Softmax* heads) {
  float unit[Values::SPANS];
  read_scales<Values::SPANS>(v_scales, count, room.scale, room.zero);
  weigh(count, room, unit, heads);
  each_block<Values>(v, count, room, [&](int64_t start, int64_t slots, const uint8_t* codes) {
    fetch(next_scales + start * Keys::SCALES, slots * Keys::SCALES * sizeof *next_scales);
    by_element<VALUE_BITS, VALUE_DIM>(codes, slots, room.values);
    add_codes(room, unit, start, slots / 4, reinterpret_cast<const char*>(next + start * Keys::ROW), heads);
  });
}

#else

// Adds the weighted values of `count` slots to each head of the group; meanwhile memory from `ahead` on is asked for.
template <int VECTOR = 0, int HEAD = 0>
inline void add_numbers(const Room& room, const scalar* v, int64_t count, const char* ahead, Softmax* heads) {
  constexpr int HEADS = at_most(SUMS / 2, GROUP - HEAD);
  constexpr int COUNT = at_most(SUMS / at_most(SUMS / 2, GROUP), VECTORS - VECTOR);
  constexpr int64_t EACH = HEAD ? 0 : Keys::ROW * sizeof(Keys::element) * COUNT / VECTORS;
  vec sums[COUNT][HEADS] = {};
  for (int64_t s = 0; s < count; ++s, ahead += EACH) {
    fetch(ahead, EACH);
#pragma GCC unroll 24
    for (int i = 0; i < COUNT; ++i) {
      const vec value = widen_lanes(v + s * VALUE_DIM + (VECTOR + i) * LANES);
#pragma GCC unroll 24
      for (int h = 0; h < HEADS; ++h) sums[i][h] += room.weights[HEAD + h][s] * value;
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 24
    for (int h = 0; h < HEADS; ++h) heads[HEAD + h].values[VECTOR + i] += sums[i][h];
  if constexpr (HEAD + HEADS < GROUP) add_numbers<VECTOR, HEAD + HEADS>(room, v, count, ahead, heads);
  else if constexpr (VECTOR + COUNT < VECTORS) add_numbers<VECTOR + COUNT>(room, v, count, ahead, heads);
}

// Adds the weighted values of a run's `count` slots to each head of the group; what comes next is asked for meanwhile.
void add(Room& room, const Values::element* v, const uint16_t*, int64_t count, const Keys::element* next,
         const uint16_t* next_scales, Softmax* heads) {
  fetch(next_scales, count * Keys::SCALES * sizeof *next_scales);
  add_numbers(room, v, count, reinterpret_cast<const char*>(next), heads);
}

#endif

// Where the weights of each query head and slot are kept, for eviction by score: relative to the maximum that was known at
// the slot's block.
struct Kept {
  float *weights, *maxima;         // nullptr where nobody asks
  int64_t of_weights, of_maxima;  // from one query head to the next
};

// The attention of a group to `slots` neighbouring slots.
void attend(const Asked& asked, const Keys::element* k, const uint16_t* k_scales, const Values::element* v,
            const uint16_t* v_scales, const scalar* mask, int64_t slots, float softcap, const Kept& kept, Room& room,
            Softmax* heads) {
  for (int g = 0; g < GROUP; ++g) heads[g] = {{NOTHING, 0.0f}, {}, {}};
  for (int64_t start = 0; start < slots; start += RUN) {
    const int64_t count = std::min(RUN, slots - start), filled = (count + LANES - 1) / LANES * LANES;
    const Keys::element* keys = k + start * Keys::ROW;
    const Values::element* values = v + start * Values::ROW;
    show(mask + start, count, filled, room.shown);
    dot(asked, keys, k_scales + start * Keys::SCALES, values, v_scales + start * Values::SCALES, count, room);
    for (int g = 0; g < GROUP; ++g) {
      const float shrink = softmax(room.weights[g], room.shown, count, filled, softcap, heads[g].running);
      if (kept.weights != nullptr) {
        std::memcpy(kept.weights + g * kept.of_weights + start, room.weights[g], count * sizeof(float));
        for (int64_t s = 0; s < count; s += BLOCK)
          kept.maxima[g * kept.of_maxima + (start + s) / BLOCK] = heads[g].running.maximum;
      }
      if (shrink == 1.0f) continue;
      for (vec& value : heads[g].values) value *= shrink;
      for (float& zeros : heads[g].zeros) zeros *= shrink;
    }
    add(room, values, v_scales + start * Values::SCALES, count, keys + count * Keys::ROW,
        k_scales + (start + count) * Keys::SCALES, heads);
  }
  for (int g = 0; g < GROUP; ++g)
    for (int i = 0; i < VECTORS; ++i) heads[g].values[i] += heads[g].zeros[i / Values::OF_SPAN];
}

// The output of a query head from its parts, GROUP from one to the next; 0 for one that no slot is shown to. Returns the
// softmax of all.
Running merge(const Softmax* parts, int64_t count, float sink, scalar* out) {
  float maximum = sink;
  for (int64_t n = 0; n < count; ++n) maximum = std::max(maximum, parts[n * GROUP].running.maximum);
  if (maximum == NOTHING) {
    float sum = 0.0f;  // or no number
    for (int64_t n = 0; n < count; ++n) sum += parts[n * GROUP].running.sum;
    std::fill(out, out + VALUE_DIM, narrow(sum));
    return {0.0f, 1.0f};
  }
  float sum = sink == NOTHING ? 0.0f : std::exp(sink - maximum);
  vec values[VECTORS] = {};
  for (int64_t n = 0; n < count; ++n) {
    const Softmax& part = parts[n * GROUP];
    const float weight = std::exp(part.running.maximum - maximum);
    sum += part.running.sum * weight;
    for (int i = 0; i < VECTORS; ++i) values[i] += part.values[i] * weight;
  }
  float whole[PADDED<VALUE_DIM>];
  for (int j = 0; j < Values::SPANS; ++j)
    std::memcpy(whole + j * Values::SPAN, values + j * Values::OF_SPAN, Values::SPAN * sizeof *whole);
  if constexpr (Values::IN_CODES) rotate<VALUE_DIM>(whole);
  for (int d = 0; d < VALUE_DIM; ++d) out[d] = narrow(whole[d] / sum);
  return {maximum, sum};
}

// Adds to each slot's score its attention, the mean over the group.
void add_scores(const Kept& kept, const Running (&all)[GROUP], int64_t slots, float* scores) {
  for (int64_t start = 0; start < slots; start += BLOCK)
    for (int g = 0; g < GROUP; ++g) {
      const float* weights = kept.weights + g * kept.of_weights;
      const float top = kept.maxima[g * kept.of_maxima + start / BLOCK];
      const float share = top == NOTHING ? 0.0f : std::exp(top - all[g].maximum) / (all[g].sum * GROUP);
      const int64_t stop = std::min(slots, start + BLOCK);
      int64_t s = start;
      for (; s + LANES <= stop; s += LANES) {
        const vec sum = read<vec>(scores + s) + read<vec>(weights + s) * share;
        std::memcpy(scores + s, &sum, sizeof sum);
      }
      for (; s < stop; ++s) scores[s] += weights[s] * share;
    }
}

// What workers find. The part of a head that a worker has is number head + worker.
struct Found {
  Buffer<Softmax> parts;
  Buffer<float> weights, maxima;
};

void* open(const Attention& of, int64_t workers) {
  const int64_t scored = of.scores == nullptr ? 0 : of.heads() * GROUP, blocks = (of.slots + BLOCK - 1) / BLOCK;
  return new Found{Buffer<Softmax>((of.heads() + workers) * GROUP), Buffer<float>(scored * of.slots),
                   Buffer<float>(scored * blocks)};
}

void close(void* room) { delete static_cast<Found*>(room); }

Kept kept_of(const Attention& of, const Found& found, int64_t head, int64_t block) {
  if (of.scores == nullptr) return Kept{};
  const int64_t blocks = (of.slots + BLOCK - 1) / BLOCK;
  return {found.weights.at + head * GROUP * of.slots + block * BLOCK, found.maxima.at + head * GROUP * blocks + block,
          of.slots, blocks};
}

void attend_share(const Attention& of, void* room_of_all, const Shares& shares, int64_t worker) {
  const Found& found = *static_cast<Found*>(room_of_all);
  const int64_t slots = of.slots, blocks = (slots + BLOCK - 1) / BLOCK, last = shares.first[worker + 1];
  Keys::element* k_cache = static_cast<Keys::element*>(of.k_cache);
  Values::element* v_cache = static_cast<Values::element*>(of.v_cache);
  uint16_t *k_scales = static_cast<uint16_t*>(of.k_scales), *v_scales = static_cast<uint16_t*>(of.v_scales);
  Room room;
  Asked asked;
  for (int64_t block = shares.first[worker], head = block / blocks; block < last; block = ++head * blocks) {
    const int64_t row = head / of.kv_heads, of_row = head % of.kv_heads, place = of.place(head);
    const int64_t into = of.slot[row * of.slot_heads + of_row % of.slot_heads], written = head * slots + into;
    const int64_t start = block % blocks * BLOCK, stop = std::min(slots, (last - head * blocks) * BLOCK);
    const int64_t at = head * slots + start;
    const float* mean = of.key_mean == nullptr ? nullptr : of.key_mean + of_row * KEY_DIM;
    if (start <= into && into < stop) {
      store<Keys>(of.k.of<scalar>(row, place), mean, k_cache + written * Keys::ROW, k_scales + written * Keys::SCALES);
      store<Values>(of.v.of<scalar>(row, place), nullptr, v_cache + written * Values::ROW,
                    v_scales + written * Values::SCALES);
      if (of.scores != nullptr) of.positions[written] = static_cast<int32_t>(of.seen[row]), of.scores[written] = 0.0f;
    }
    ask(of.q.of<scalar>(row, place * GROUP), of.q.head, mean, of.scale, asked);
    attend(asked, k_cache + at * Keys::ROW, k_scales + at * Keys::SCALES, v_cache + at * Values::ROW,
           v_scales + at * Values::SCALES,
           static_cast<const scalar*>(of.mask) + row * of.mask_row + of_row * of.mask_head + start, stop - start,
           of.softcap, kept_of(of, found, head, start / BLOCK), room, found.parts.at + (head + worker) * GROUP);
  }
}

void merge_head(const Attention& of, void* room, const Shares& shares, int64_t head) {
  const Found& found = *static_cast<Found*>(room);
  const int64_t blocks = (of.slots + BLOCK - 1) / BLOCK, place = of.place(head) * GROUP;
  int64_t first = head * shares.workers / of.heads(), count = 0;  // the workers that its blocks fell to
  while (first > 0 && shares.first[first] > head * blocks) --first;
  while (shares.first[first + 1] <= head * blocks) ++first;
  while (first + count < shares.workers && shares.first[first + count] < (head + 1) * blocks) ++count;
  scalar* out = static_cast<scalar*>(of.out) + head / of.kv_heads * of.out_row;
  Running all[GROUP];
  for (int g = 0; g < GROUP; ++g)
    all[g] = merge(found.parts.at + (head + first) * GROUP + g, count, of.sinks == nullptr ? NOTHING : of.sinks[place + g],
                   out + (place + g) * VALUE_DIM);
  if (of.scores != nullptr) add_scores(kept_of(of, found, head, 0), all, of.slots, of.scores + head * of.slots);
}

constexpr int64_t SLOT_BYTES = Keys::ROW * sizeof(Keys::element) + Values::ROW * sizeof(Values::element) +
                               (Keys::SCALES + Values::SCALES) * sizeof(uint16_t);
constexpr DecodeKernel KERNEL{BLOCK, SLOT_BYTES, open, attend_share, merge_head, close};

}  // namespace

extern "C" const DecodeKernel* xkv_decode_coded() { return &KERNEL; }
