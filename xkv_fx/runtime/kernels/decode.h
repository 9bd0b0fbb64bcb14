// What an operator asks of a decode kernel: the attention of one token a row for KV heads that are cached alike, cut into
// blocks of slots so that all threads have the same to do, however many caches a layer has.

#include <cstdint>

struct Vectors {  // of a token: one for each head of the layer, the elements of each side by side
  const void* at;
  int64_t row, head;  // elements from one to the next
  template <typename scalar>
  const scalar* of(int64_t of_row, int64_t of_head) const {
    return static_cast<const scalar*>(at) + of_row * row + of_head * head;
  }
};

struct Attention {
  Vectors q, k, v;
  void* out;              // of all query heads of the layer, contiguous
  int64_t out_row;        // elements from one row to the next
  const int64_t* places;  // of the KV heads among those of the layer; nullptr where they are all of them
  void *k_cache, *k_scales, *v_cache, *v_scales;
  const int64_t* slot;
  int64_t slot_heads;  // how many slots are given for a row: one, or one for each KV head
  const void* mask;
  int64_t mask_row, mask_head;  // elements from one to the next
  const float *sinks, *key_mean;  // of the layer's query heads, of the cache's KV heads; or nullptr
  // With these the token is noted in `positions`, and attention is added to `scores`.
  int32_t* positions;
  float* scores;
  const int64_t* seen;
  int64_t rows, kv_heads, slots;
  float scale, softcap;

  int64_t heads() const { return rows * kv_heads; }
  // Place of a KV head among those of the layer.
  int64_t place(int64_t head) const { return places == nullptr ? head % kv_heads : places[head % kv_heads]; }
};

// Which blocks fall to which worker: those from first[worker] up to first[worker + 1], never none.
struct Shares {
  const int64_t* first;
  int64_t workers;
};

struct DecodeKernel {
  int64_t block, slot_bytes;                            // slots of a block, and bytes of a slot of a head
  void* (*open)(const Attention&, int64_t workers);     // room for what workers find, to be closed
  void (*attend)(const Attention&, void* room, const Shares&, int64_t worker);
  void (*merge)(const Attention&, void* room, const Shares&, int64_t head);  // once all have attended
  void (*close)(void* room);

  int64_t blocks(int64_t slots) const { return (slots + block - 1) / block; }
};
