// CPU kernels of the ops cache_write, paged_attention, sparse_decode, anchor_decode and
// block_topk.
//
// Cache tiles are KEY_TRANSPOSED (kvcache/layout.py): per (block, KV head) a key block
// [head_size, block_size] followed by a value block [block_size, head_size]. Logits of a
// whole block then come from contiguous loads, and so does the weighted sum of values.
//
// Arithmetic is fp32 whatever the cache holds. Work is cut into pieces whose size depends
// on the request alone, never on the batch or on the number of threads, and partial
// results are merged in a fixed order: a row's result does not depend on its neighbours.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
// vec.h first: its AVX2 part includes functional_bfloat16.h, which needs functional_base.h whole.
#include <ATen/cpu/vec/vec.h>
#include <ATen/cpu/vec/functional_base.h>
#include <ATen/ops/max.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr int64_t kSplitTokens = 1024;  // tokens per piece of a decode row
constexpr int64_t kTileRows = 48;       // (query token, head) pairs per prefill tile
constexpr int64_t kGroupTokens = 256;   // tokens per softmax step of a prefill tile

// Accumulators of a prefill tile, in rows x vectors: half of the registers, or 3/4 of AVX2's 16.
constexpr int kPrefillRows = kLanes == 16 ? 8 : 6, kPrefillCols = 2;

inline Vec load(const float* p) { return Vec::loadu(p); }
inline Vec load(const c10::BFloat16* p) {
  Vec v;
  at::vec::load_fp32_from_bf16(p, v);
  return v;
}
inline Vec load(const c10::Half* p) {
  Vec v;
  at::vec::load_fp32_from_fp16(p, v);
  return v;
}

// Asks for `elements` of the next tile while this one is computed: that hides the jump between
// physical blocks. Line by line beside the arithmetic, for a burst would wait for the memory.
template <typename T>
inline void prefetch(const T* next, int64_t elements) {
  const char* bytes = reinterpret_cast<const char*>(next);
  for (int64_t i = 0; i < elements * static_cast<int64_t>(sizeof(T)); i += 64)
    __builtin_prefetch(bytes + i, 0, 2);
}

// Calls f(0), ..., f(N - 1) with constants. A loop would do, but the compiler unrolls it too late
// to see that a tile's accumulators fit the registers, and gives them memory as well.
template <int N, typename F>
__attribute__((always_inline)) inline void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// acc[r][c] += left[r * left_stride + i] * right[i * right_stride + c * kLanes] over i in
// [first, last). next: the same place in the next tile, read where PREFETCH says so.
template <typename T, int ROWS, int COLS, bool PREFETCH>
__attribute__((always_inline)) inline void multiply_add(
    Vec (&acc)[ROWS][COLS], const float* left, int64_t left_stride, const T* right,
    int64_t right_stride, const T* next, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    if constexpr (PREFETCH) prefetch(next + i * right_stride, COLS * kLanes);
    Vec columns[COLS];
    unrolled<COLS>([&](auto c) { columns[c] = load(right + i * right_stride + c * kLanes); });
    unrolled<ROWS>([&](auto r) {
      const Vec factor(left[r * left_stride + i]);
      unrolled<COLS>([&](auto c) { acc[r][c] = at::vec::fmadd(factor, columns[c], acc[r][c]); });
    });
  }
}

// logits[row, t] = sum_d query[row, d] * key[d, t] for ROWS rows and COLS vectors of tokens.
template <typename T, int ROWS, int COLS, bool PREFETCH>
inline void logits_tile(const float* query, const T* key, const T* next, int64_t head_size,
                        int64_t block_size, float* logits, int64_t logits_stride) {
  Vec acc[ROWS][COLS];
  unrolled<ROWS>([&](auto r) { unrolled<COLS>([&](auto c) { acc[r][c] = Vec(0.f); }); });
  multiply_add<T, ROWS, COLS, PREFETCH>(acc, query, head_size, key, block_size, next, 0, head_size);
  unrolled<ROWS>([&](auto r) {
    unrolled<COLS>([&](auto c) { acc[r][c].store(logits + r * logits_stride + c * kLanes); });
  });
}

// out[row, d] += sum_{t in [first, last)} weights[row, t] * value[t, d]; next as above.
template <typename T, int ROWS, int COLS, bool PREFETCH>
inline void values_tile(const float* weights, int64_t weights_stride, const T* value,
                        const T* next, int64_t head_size, int64_t first, int64_t last,
                        float* out) {
  Vec acc[ROWS][COLS];
  unrolled<ROWS>([&](auto r) {
    unrolled<COLS>([&](auto c) { acc[r][c] = Vec::loadu(out + r * head_size + c * kLanes); });
  });
  multiply_add<T, ROWS, COLS, PREFETCH>(acc, weights, weights_stride, value, head_size, next,
                                        first, last);
  unrolled<ROWS>([&](auto r) {
    unrolled<COLS>([&](auto c) { acc[r][c].store(out + r * head_size + c * kLanes); });
  });
}

// Calls f<ROWS, COLS>(row, column) over a rows x columns grid, in register-sized tiles of at most
// MAX_ROWS rows and MAX_COLS vectors. A row's arithmetic does not depend on the tile it is in.
template <int MAX_ROWS, int MAX_COLS, typename F>
inline void for_tiles(int64_t rows, int64_t columns, F&& f, int64_t row = 0) {
  const auto across = [&]<int COLS>(auto&& self, std::integral_constant<int, COLS> tag, int64_t c) {
    for (; c + COLS * kLanes <= columns; c += COLS * kLanes)
      f(std::integral_constant<int, MAX_ROWS>{}, tag, row, c);
    if constexpr (COLS > 1) self(self, std::integral_constant<int, COLS / 2>{}, c);
  };
  for (; row + MAX_ROWS <= rows; row += MAX_ROWS)
    across(across, std::integral_constant<int, MAX_COLS>{}, 0);
  if constexpr (MAX_ROWS > 1) for_tiles<MAX_ROWS - 1, MAX_COLS>(rows, columns, f, row);
}

template <typename T, int MAX_ROWS, int MAX_COLS>
void block_logits(const float* query, int64_t rows, const T* key, const T* next,
                  int64_t head_size, int64_t block_size, float* logits, int64_t logits_stride) {
  for_tiles<MAX_ROWS, MAX_COLS>(
      rows, block_size, [&](auto r_tag, auto c_tag, int64_t row, int64_t column) {
        const auto run = [&](auto with_prefetch, const T* next_tile) {
          logits_tile<T, r_tag(), c_tag(), with_prefetch()>(
              query + row * head_size, key + column, next_tile, head_size, block_size,
              logits + row * logits_stride + column, logits_stride);
        };
        if (next && row == 0)
          run(std::true_type{}, next + column);
        else
          run(std::false_type{}, nullptr);
      });
}

template <typename T, int MAX_ROWS, int MAX_COLS>
void add_values(const float* weights, int64_t rows, int64_t weights_stride, const T* value,
                const T* next, int64_t head_size, int64_t first, int64_t last, float* out) {
  if (first >= last) return;
  for_tiles<MAX_ROWS, MAX_COLS>(
      rows, head_size, [&](auto r_tag, auto c_tag, int64_t row, int64_t column) {
        const auto run = [&](auto with_prefetch, const T* next_tile) {
          values_tile<T, r_tag(), c_tag(), with_prefetch()>(
              weights + row * weights_stride, weights_stride, value + column, next_tile, head_size,
              first, last, out + row * head_size + column);
        };
        if (next && row == 0)
          run(std::true_type{}, next + column);
        else
          run(std::false_type{}, nullptr);
      });
}

// kvcache/spans.py: a query at position p sees the tokens [0, p] but for [sink, gap_end(p)).
struct Span {
  int64_t sink, floor, alpha, beta_64ths;
  // Never falls as the position grows.
  int64_t gap_end(int64_t position) const {
    return position + 1 - std::max(floor, alpha + beta_64ths * (position + 1) / 64);
  }
};

// Tokens [begin, end) that a query does not see.
struct Gap {
  int64_t begin = 0, end = 0;
};

struct Rule {
  const int32_t* values;  // [num_reqs, num_kv_heads, num_spans, 4], or null: everything is seen
  int64_t num_kv_heads, num_spans;  // of a KV head: one, or one for each query head of the group

  // Of query head `g` of a KV head's group.
  Span span_of(int64_t row, int64_t head, int64_t g) const {
    if (!values) return {0, std::numeric_limits<int32_t>::max(), 0, 0};
    const int32_t* v = values + ((row * num_kv_heads + head) * num_spans + g % num_spans) * 4;
    return {v[0], v[1], v[2], v[3]};
  }
};

// What is hidden from all of these spans, at this position and at later ones: its memory may hold
// anything. The end may lie before the beginning.
inline Gap hidden_from_all(const std::vector<Span>& spans, int64_t position) {
  Gap gap{0, std::numeric_limits<int64_t>::max()};
  for (const Span& span : spans) {
    gap.begin = std::max(gap.begin, span.sink);
    gap.end = std::min(gap.end, span.gap_end(position));
  }
  return gap;
}

// exp(x), off by a few ULPs about 0; 0 for minus infinity.
inline Vec weight_of(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  // 2^f by a minimax polynomial over [0, 1), then the whole part of the exponent. Half of the
  // instructions of ATen's exp_u20.
  const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(1.442695041f));
  const __m512 f = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(1.877576673e-03f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.989340095e-03f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.582631805e-02f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.401536170e-01f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931530732e-01f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.999999251e-01f));
  return _mm512_scalef_ps(p, y);
#else
  return x.exp_u20();
#endif
}

struct SoftmaxState {  // one per row
  float max = kMinusInf;
  float sum = 0.f;
};

// Masks one row's logits of a run of tokens, updates the running maximum, turns the logits into
// weights and rescales the row's accumulator. Returns the sum of the run's weights, relative
// to the new maximum; 0 when all is hidden.
inline float softmax_row(float* logits, int64_t num_tokens, int64_t hidden_begin,
                        int64_t hidden_end, int64_t visible_end, SoftmaxState& state,
                        float* out, int64_t head_size) {
  for (int64_t t = std::max<int64_t>(hidden_begin, 0); t < std::min(hidden_end, num_tokens); ++t)
    logits[t] = kMinusInf;
  for (int64_t t = std::max<int64_t>(visible_end, 0); t < num_tokens; ++t) logits[t] = kMinusInf;
  Vec max_vec(kMinusInf);
  for (int64_t t = 0; t < num_tokens; t += kLanes)
    max_vec = at::vec::maximum(max_vec, Vec::loadu(logits + t));
  const float run_max = at::vec::vec_reduce_all<float>(
      [](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, max_vec);
  if (run_max == kMinusInf) {  // nothing of this run is visible to this row
    std::fill(logits, logits + num_tokens, 0.f);
    return 0.f;
  }
  const float new_max = std::max(state.max, run_max);
  if (new_max != state.max) {
    const float shrink = state.sum == 0.f ? 0.f : std::exp(state.max - new_max);
    state.sum *= shrink;
    const Vec shrink_vec(shrink);
    for (int64_t d = 0; d < head_size; d += kLanes)
      (Vec::loadu(out + d) * shrink_vec).store(out + d);
    state.max = new_max;
  }
  const Vec new_max_vec(new_max);
  Vec sum_vec(0.f);
  for (int64_t t = 0; t < num_tokens; t += kLanes) {
    const Vec weight = weight_of(Vec::loadu(logits + t) - new_max_vec);
    weight.store(logits + t);
    sum_vec = sum_vec + weight;
  }
  const float run_sum =
      at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sum_vec);
  state.sum += run_sum;
  return run_sum;
}

struct Cache {
  const char* key;
  const char* value;
  int64_t block_stride, head_stride;  // elements
  int64_t block_size, head_size, num_kv_heads;
};

template <typename T>
inline const T* tile(const char* base, const Cache& cache, int64_t block, int64_t head) {
  return reinterpret_cast<const T*>(base) + block * cache.block_stride + head * cache.head_stride;
}

struct DecodeArgs {
  Cache cache;
  int64_t group;
  const int32_t *block_table, *seq_lens;
  const int32_t *blocks, *counts;  // null: every block of the row
  const int64_t* heads;            // whose blocks each KV head reads; null: those of its index
  Rule rule;
  int64_t table_stride, blocks_row_stride, blocks_head_stride, counts_stride;
  float scale;

  int64_t source(int64_t head) const { return heads ? heads[head] : head; }
};

// What a block's weights are relative to, and their sum; [group, width] each, or null.
struct BlockStats {
  float *max, *sum;
};

// Attention of one decode row's head group over selected blocks [first, last). Where stats are
// given, those of block i and head g go to index g * stats_width + i. Where out is null, keys
// alone are read.
template <typename T>
void decode_piece(const DecodeArgs& a, const T* query, int64_t row, int64_t head, int64_t first,
                  int64_t last, float* scratch, SoftmaxState* states, std::vector<Span>& spans,
                  float* out, BlockStats stats, int64_t stats_width) {
  const int64_t head_size = a.cache.head_size, block_size = a.cache.block_size;
  const int64_t position = a.seq_lens[row] - 1;
  const bool reads_values = out != nullptr;
  std::vector<int64_t> gap_ends(a.group);
  for (int64_t g = 0; g < a.group; ++g) {
    spans[g] = a.rule.span_of(row, head, g);
    gap_ends[g] = spans[g].gap_end(position);
  }
  const Gap gap = hidden_from_all(spans, position);
  float* logits = scratch;                           // [group, block_size]
  float* scaled = scratch + a.group * block_size;    // [group, head_size]
  for (int64_t g = 0; g < a.group; ++g)
    for (int64_t d = 0; d < head_size; ++d)
      scaled[g * head_size + d] = static_cast<float>(query[g * head_size + d]) * a.scale;
  const int32_t* blocks =
      a.blocks ? a.blocks + row * a.blocks_row_stride + a.source(head) * a.blocks_head_stride
               : nullptr;
  const int32_t* table = a.block_table + row * a.table_stride;
  const auto logical = [blocks](int64_t i) { return blocks ? blocks[i] : i; };
  for (int64_t i = first; i < last; ++i) {
    const int64_t base = logical(i) * block_size, physical = table[logical(i)];
    if (base > position) break;  // a block of tokens to come: so are those after it
    const T* key = tile<T>(a.cache.key, a.cache, physical, head);
    const T* value = tile<T>(a.cache.value, a.cache, physical, head);
    const T *next_key = nullptr, *next_value = nullptr;
    if (i + 1 < last) {
      next_key = tile<T>(a.cache.key, a.cache, table[logical(i + 1)], head);
      next_value = tile<T>(a.cache.value, a.cache, table[logical(i + 1)], head);
    }
    block_logits<T, 4, 4>(scaled, a.group, key, next_key, head_size, block_size, logits,
                          block_size);
    const int64_t end = std::min(block_size, position + 1 - base);
    for (int64_t g = 0; g < a.group; ++g) {
      const float sum = softmax_row(logits + g * block_size, block_size, spans[g].sink - base,
                                    gap_ends[g] - base, end, states[g], out + g * head_size,
                                    reads_values ? head_size : 0);
      if (stats.max) {
        stats.max[g * stats_width + i] = states[g].max;
        stats.sum[g * stats_width + i] = sum;
      }
    }
    if (!reads_values) continue;
    // What is hidden is not read at all: its memory may hold NaN, and 0 * NaN is NaN.
    const int64_t hidden_begin = std::clamp<int64_t>(gap.begin - base, 0, end);
    const int64_t hidden_end = std::clamp<int64_t>(gap.end - base, hidden_begin, end);
    add_values<T, 4, 4>(logits, a.group, block_size, value, next_value, head_size, 0,
                        hidden_begin, out);
    add_values<T, 4, 4>(logits, a.group, block_size, value, next_value, head_size, hidden_end, end,
                        out);
  }
}

// Merges a row's pieces; each head's maximum and sum of weights over them goes to totals[g],
// the output to out unless that is null.
template <typename T>
void merge_pieces(const float* pieces, int64_t num_pieces, int64_t group, int64_t head_size,
                  T* out, SoftmaxState* totals) {
  const int64_t width = head_size + 2;  // accumulator, maximum, sum
  std::vector<float> total(head_size);
  for (int64_t g = 0; g < group; ++g) {
    float max = kMinusInf, sum = 0.f;
    for (int64_t p = 0; p < num_pieces; ++p)
      max = std::max(max, pieces[(p * group + g) * width + head_size]);
    std::fill(total.begin(), total.end(), 0.f);
    for (int64_t p = 0; p < num_pieces; ++p) {
      const float* piece = pieces + (p * group + g) * width;
      if (piece[head_size + 1] == 0.f) continue;
      const float weight = std::exp(piece[head_size] - max);
      sum += weight * piece[head_size + 1];
      if (!out) continue;
      for (int64_t d = 0; d < head_size; ++d) total[d] += weight * piece[d];
    }
    totals[g] = {max, sum};
    if (!out) continue;
    const float inverse = sum == 0.f ? 0.f : 1.f / sum;  // no block selected: zeros
    for (int64_t d = 0; d < head_size; ++d)
      out[g * head_size + d] = static_cast<T>(total[d] * inverse);
  }
}

// Shares of the blocks in a row's attention, summed over the heads of a group; 0 past the end.
inline void sum_masses(BlockStats stats, const std::vector<SoftmaxState>& totals,
                       int64_t num_blocks, int64_t width, float* mass) {
  std::fill(mass, mass + width, 0.f);
  for (size_t g = 0; g < totals.size(); ++g) {
    const float *max = stats.max + g * width, *sum = stats.sum + g * width;
    const float inverse = 1.f / totals[g].sum;
    const Vec row_max(totals[g].max), scale(inverse);
    int64_t b = 0;
    for (; b + kLanes <= num_blocks; b += kLanes) {
      const Vec share = Vec::loadu(sum + b) * scale * (Vec::loadu(max + b) - row_max).exp();
      (Vec::loadu(mass + b) + share).store(mass + b);
    }
    for (; b < num_blocks; ++b) mass[b] += sum[b] * inverse * std::exp(max[b] - totals[g].max);
  }
}

struct Piece {
  int32_t row, head;
  int32_t first, last;  // selected blocks
};

// out: undefined where only masses are asked for.
// mass: null, or [num_reqs, num_kv_heads, mass_width] of block shares (see anchor_decode).
template <typename T>
void decode_typed(const DecodeArgs& a, const at::Tensor& query, const at::Tensor& out, float* mass,
                  int64_t mass_width) {
  const int64_t num_reqs = query.size(0), heads = a.cache.num_kv_heads, group = a.group;
  const int64_t head_size = a.cache.head_size, width = head_size + 2;
  const int64_t blocks_per_piece = std::max<int64_t>(1, kSplitTokens / a.cache.block_size);
  std::vector<Piece> pieces;
  std::vector<int64_t> first_piece(num_reqs * heads + 1, 0);
  for (int64_t row = 0; row < num_reqs; ++row)
    for (int64_t head = 0; head < heads; ++head) {
      const int32_t count = a.counts ? a.counts[row * a.counts_stride + a.source(head)]
                                     : (a.seq_lens[row] + a.cache.block_size - 1) /
                                           a.cache.block_size;
      for (int32_t first = 0; first < count; first += blocks_per_piece)
        pieces.push_back({static_cast<int32_t>(row), static_cast<int32_t>(head), first,
                          std::min<int32_t>(count, first + blocks_per_piece)});
      first_piece[row * heads + head + 1] = pieces.size();
    }
  std::vector<float> partial(pieces.size() * group * width);
  // Not initialised: every block of a row writes its own, and no other is read.
  const int64_t num_stats = mass ? num_reqs * heads * group * mass_width : 0;
  const std::unique_ptr<float[]> all_stats(new float[2 * num_stats]);
  const auto stats_of = [&](int64_t row_head) {
    float* first = all_stats.get() + row_head * group * mass_width;
    return mass ? BlockStats{first, first + num_stats} : BlockStats{nullptr, nullptr};
  };
  const T* query_data = query.const_data_ptr<T>();
  T* out_data = out.defined() ? out.mutable_data_ptr<T>() : nullptr;
  at::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(group * (a.cache.block_size + head_size));
    std::vector<float> sums(group * head_size);
    std::vector<SoftmaxState> states(group);
    std::vector<Span> spans(group);
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[i];
      std::fill(sums.begin(), sums.end(), 0.f);
      std::fill(states.begin(), states.end(), SoftmaxState{});
      decode_piece<T>(a, query_data + piece.row * query.stride(0) + piece.head * group * head_size,
                      piece.row, piece.head, piece.first, piece.last, scratch.data(),
                      states.data(), spans, out_data ? sums.data() : nullptr,
                      stats_of(piece.row * heads + piece.head), mass_width);
      for (int64_t g = 0; g < group; ++g) {
        float* slot = partial.data() + (i * group + g) * width;
        std::memcpy(slot, sums.data() + g * head_size, head_size * sizeof(float));
        slot[head_size] = states[g].max;
        slot[head_size + 1] = states[g].sum;
      }
    }
  });
  at::parallel_for(0, num_reqs * heads, mass ? 1 : 64, [&](int64_t begin, int64_t end) {
    std::vector<SoftmaxState> totals(group);
    for (int64_t i = begin; i < end; ++i) {
      T* row_out = nullptr;
      if (out_data)
        row_out = out_data + (i / heads) * out.stride(0) + (i % heads) * group * head_size;
      merge_pieces<T>(partial.data() + first_piece[i] * group * width,
                      first_piece[i + 1] - first_piece[i], group, head_size, row_out,
                      totals.data());
      if (mass) {
        const int64_t num_blocks =
            (a.seq_lens[i / heads] + a.cache.block_size - 1) / a.cache.block_size;
        sum_masses(stats_of(i), totals, num_blocks, mass_width, mass + i * mass_width);
      }
    }
  });
}

// Forced sink and recent blocks, then the blocks of most mass; ascending, -1 padded.
void topk_row(const float* mass, int64_t num_blocks, int64_t budget, int64_t num_sink,
              int64_t num_recent, int32_t* blocks, int64_t width, std::vector<int32_t>& order) {
  const int64_t count = std::min(num_blocks, std::max<int64_t>(budget, 1));
  order.resize(num_blocks);
  for (int64_t b = 0; b < num_blocks; ++b) order[b] = b;
  if (count < num_blocks) {
    // The last block holds the current token: it comes before sinks and other recent blocks.
    const auto rank = [&](int32_t b) {
      if (b == num_blocks - 1) return 3;
      if (b >= num_blocks - num_recent) return 2;
      return b < num_sink ? 1 : 0;
    };
    std::nth_element(order.begin(), order.begin() + count, order.end(), [&](int32_t x, int32_t y) {
      const int rx = rank(x), ry = rank(y);
      if (rx != ry) return rx > ry;
      if (rx == 0 && mass[x] != mass[y]) return mass[x] > mass[y];
      return rx == 1 ? x < y : x > y;
    });
    std::sort(order.begin(), order.begin() + count);
  }
  std::copy(order.begin(), order.begin() + count, blocks);
  std::fill(blocks + count, blocks + width, -1);
}

struct PrefillArgs {
  Cache cache;
  int64_t group;
  const int32_t *query_start, *seq_lens, *block_table;
  Rule rule;
  int64_t table_stride;
  float scale;
};

struct Tile {
  int32_t row, head, first, last;  // query tokens [first, last) of the row
};

// Whole blocks. Groups are cut by the absolute position, so a row's arithmetic is the same
// however its prompt is chunked and whatever of it a prefix hit supplies.
inline int64_t group_tokens(int64_t block_size) {
  return std::max<int64_t>(1, kGroupTokens / block_size) * block_size;
}

// Memory for whole vectors, at addresses where none of them crosses a cache line.
class VecBuffer {
 public:
  explicit VecBuffer(int64_t elements) : vectors_(elements / kLanes) {}
  float* data() { return reinterpret_cast<float*>(vectors_.data()); }

 private:
  std::vector<Vec> vectors_;
};

struct TileScratch {
  VecBuffer query, logits, key, value, out;
  std::vector<SoftmaxState> states;
  std::vector<Span> spans;  // of the group's query heads
  TileScratch(int64_t rows, int64_t group, int64_t head_size, int64_t block_size)
      : query(rows * head_size), logits(rows * group_tokens(block_size)), key(head_size * block_size),
        value(head_size * block_size), out(rows * head_size), states(rows),
        spans(group) {}
};

// The block as floats; `next` is the block to ask the memory for meanwhile, or null.
// A tile's rows use one key block many times: widening it once beats widening it per row.
template <typename T>
inline const float* widen(const T* from, const T* next, int64_t elements, VecBuffer& to) {
  if constexpr (std::is_same_v<T, float>) return from;
  for (int64_t i = 0; i < elements; i += kLanes) {
    if (next) prefetch(next + i, kLanes);
    load(from + i).store(to.data() + i);
  }
  return to.data();
}

template <typename T>
void prefill_tile(const PrefillArgs& a, const Tile& t, const T* query, int64_t query_stride,
                  TileScratch& s, T* out, int64_t out_stride) {
  const int64_t head_size = a.cache.head_size, block_size = a.cache.block_size, group = a.group;
  const int64_t rows = (t.last - t.first) * group;
  const int64_t start = a.query_start[t.row];
  const int64_t query_len = a.query_start[t.row + 1] - start;
  const int64_t base_position = a.seq_lens[t.row] - query_len;
  const int64_t first_position = base_position + t.first, last_position = base_position + t.last - 1;
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = query + (start + t.first + r / group) * query_stride +
                    (t.head * group + r % group) * head_size;
    for (int64_t d = 0; d < head_size; ++d)
      s.query.data()[r * head_size + d] = static_cast<float>(from[d]) * a.scale;
  }
  std::fill_n(s.out.data(), rows * head_size, 0.f);
  std::fill(s.states.begin(), s.states.end(), SoftmaxState{});
  const int32_t* table = a.block_table + t.row * a.table_stride;
  // The tile's first queries have the smallest gaps: what lies in all of them is hidden from all,
  // and hidden memory may hold NaN. Only tokens that some row of the tile sees are used.
  for (int64_t g = 0; g < group; ++g) s.spans[g] = a.rule.span_of(t.row, t.head, g);
  const Gap gap = hidden_from_all(s.spans, first_position);
  const int64_t gap_end = std::max<int64_t>(gap.begin, gap.end);
  const auto in_gap = [&](int64_t begin, int64_t end) {
    return begin >= gap.begin && end <= gap_end;
  };
  const int64_t num_tokens = last_position + 1, step = group_tokens(block_size);
  for (int64_t base = 0; base < num_tokens; base += step) {
    if (in_gap(base, base + step)) {
      base = gap_end / step * step - step;
      continue;
    }
    const int64_t num_blocks = (std::min(step, num_tokens - base) + block_size - 1) / block_size;
    const auto for_seen_blocks = [&](const char* cache, VecBuffer& wide, auto&& use) {
      for (int64_t b = 0; b < num_blocks; ++b) {
        const int64_t begin = base + b * block_size;
        if (in_gap(begin, begin + block_size)) continue;
        const int32_t* physical = table + begin / block_size;
        const T* at = tile<T>(cache, a.cache, physical[0], t.head);
        const T* next = nullptr;
        if (begin + block_size < num_tokens) next = tile<T>(cache, a.cache, physical[1], t.head);
        const float* values = widen(at, next, head_size * block_size, wide);
        if constexpr (std::is_same_v<T, float>)
          use(values, next, begin);
        else
          use(values, nullptr, begin);
      }
    };
    for_seen_blocks(a.cache.key, s.key, [&](const float* key, const float* next, int64_t begin) {
      block_logits<float, kPrefillRows, kPrefillCols>(s.query.data(), rows, key, next, head_size,
                                                      block_size, s.logits.data() + begin - base,
                                                      step);
    });
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t position = first_position + r / group, width = num_blocks * block_size;
      const Span& span = s.spans[r % group];
      softmax_row(s.logits.data() + r * step, width, span.sink - base,
                  span.gap_end(position) - base, position + 1 - base, s.states[r],
                  s.out.data() + r * head_size, head_size);
    }
    for_seen_blocks(a.cache.value, s.value, [&](const float* value, const float* next,
                                                int64_t begin) {
      const auto add = [&](int64_t first, int64_t last) {
        add_values<float, kPrefillRows, kPrefillCols>(s.logits.data() + begin - base, rows, step,
                                                      value, next, head_size, first, last,
                                                      s.out.data());
      };
      const int64_t end = std::min(block_size, num_tokens - begin);
      const int64_t hidden_begin = std::clamp<int64_t>(gap.begin - begin, 0, end);
      add(0, hidden_begin);
      add(std::clamp<int64_t>(gap_end - begin, hidden_begin, end), end);
    });
  }
  for (int64_t r = 0; r < rows; ++r) {
    T* to = out + (start + t.first + r / group) * out_stride +
            (t.head * group + r % group) * head_size;
    const float inverse = 1.f / s.states[r].sum;
    for (int64_t d = 0; d < head_size; ++d)
      to[d] = static_cast<T>(s.out.data()[r * head_size + d] * inverse);
  }
}

template <typename T>
void paged_attention_typed(const PrefillArgs& a, int64_t num_reqs, const at::Tensor& query,
                           at::Tensor& out) {
  const int64_t tokens_per_tile = std::max<int64_t>(1, kTileRows / a.group);
  std::vector<Tile> tiles;
  for (int64_t row = 0; row < num_reqs; ++row) {
    const int32_t query_len = a.query_start[row + 1] - a.query_start[row];
    for (int64_t head = 0; head < a.cache.num_kv_heads; ++head)
      for (int32_t first = 0; first < query_len; first += tokens_per_tile)
        tiles.push_back({static_cast<int32_t>(row), static_cast<int32_t>(head), first,
                         std::min<int32_t>(query_len, first + tokens_per_tile)});
  }
  const T* query_data = query.const_data_ptr<T>();
  T* out_data = out.mutable_data_ptr<T>();
  // Causal tiles differ in cost by their position, so threads draw them one by one.
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    TileScratch scratch(tokens_per_tile * a.group, a.group, a.cache.head_size, a.cache.block_size);
    for (int64_t i = next++; i < static_cast<int64_t>(tiles.size()); i = next++)
      prefill_tile<T>(a, tiles[i], query_data, query.stride(0), scratch, out_data, out.stride(0));
  });
}

template <typename U>
void cache_write_typed(const at::Tensor& key, const at::Tensor& value, at::Tensor& key_cache,
                       at::Tensor& value_cache, const at::Tensor& slots) {
  const int64_t heads = key.size(1), head_size = key.size(2), block_size = key_cache.size(2);
  const int64_t num_tokens = slots.size(0);
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const U* key_data = static_cast<const U*>(key.const_data_ptr());
  const U* value_data = static_cast<const U*>(value.const_data_ptr());
  U* key_out = static_cast<U*>(key_cache.mutable_data_ptr());
  U* value_out = static_cast<U*>(value_cache.mutable_data_ptr());
  const int64_t block_stride = key_cache.stride(0), head_stride = key_cache.stride(1);
  // Head by head: consecutive tokens then write neighbouring elements of one key tile.
  at::parallel_for(0, heads * num_tokens, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / num_tokens, token = i % num_tokens;
      if (slot[token] < 0) continue;
      const int64_t block = slot[token] / block_size, offset = slot[token] % block_size;
      const int64_t tile_start = block * block_stride + head * head_stride;
      const U* from = key_data + token * key.stride(0) + head * key.stride(1);
      U* to = key_out + tile_start + offset;
      for (int64_t d = 0; d < head_size; ++d) to[d * block_size] = from[d];
      std::memcpy(value_out + tile_start + offset * head_size,
                  value_data + token * value.stride(0) + head * value.stride(1),
                  head_size * sizeof(U));
    }
  });
}

Cache make_cache(const at::Tensor& key_cache, const at::Tensor& value_cache) {
  const int64_t block_size = key_cache.size(2), head_size = key_cache.size(3);
  TORCH_CHECK(key_cache.stride(2) == 1 && key_cache.stride(3) == block_size &&
                  value_cache.stride(2) == head_size && value_cache.stride(3) == 1 &&
                  key_cache.stride(0) == value_cache.stride(0) &&
                  key_cache.stride(1) == value_cache.stride(1),
              "the CPU kernels need KEY_TRANSPOSED cache tiles");
  TORCH_CHECK(block_size % kLanes == 0 && head_size % kLanes == 0,
              "block_size and head_size must be multiples of ", kLanes);
  return {static_cast<const char*>(key_cache.const_data_ptr()),
          static_cast<const char*>(value_cache.const_data_ptr()),
          key_cache.stride(0), key_cache.stride(1), block_size, head_size, key_cache.size(1)};
}

Rule make_rule(const std::optional<at::Tensor>& rule, int64_t num_reqs, int64_t num_kv_heads,
               int64_t group) {
  if (!rule.has_value()) return {nullptr, num_kv_heads, 1};
  TORCH_CHECK(rule->is_contiguous() && rule->dim() == 4 && rule->size(0) >= num_reqs &&
                  rule->size(1) == num_kv_heads &&
                  (rule->size(2) == 1 || rule->size(2) == group) && rule->size(3) == 4,
              "a rule must be a contiguous [num_reqs, num_kv_heads, 1 or group, 4]");
  return {rule->const_data_ptr<int32_t>(), num_kv_heads, rule->size(2)};
}

const int64_t* heads_data(const std::optional<at::Tensor>& heads, int64_t num_kv_heads) {
  if (!heads.has_value()) return nullptr;
  TORCH_CHECK(heads->is_contiguous() && heads->dim() == 1 && heads->size(0) == num_kv_heads,
              "a head map must be a contiguous [num_kv_heads]");
  return heads->const_data_ptr<int64_t>();
}

void check_rows(const at::Tensor& query, const at::Tensor& out) {
  TORCH_CHECK(query.stride(2) == 1 && query.stride(1) == query.size(2) && out.stride(2) == 1 &&
                  out.stride(1) == out.size(2),
              "query and out must be contiguous per token");
}

#define DISPATCH_CACHE_DTYPE(dtype, ...)                                    \
  switch (dtype) {                                                          \
    case at::kFloat: { using T = float; __VA_ARGS__; break; }               \
    case at::kBFloat16: { using T = c10::BFloat16; __VA_ARGS__; break; }    \
    case at::kHalf: { using T = c10::Half; __VA_ARGS__; break; }            \
    default: TORCH_CHECK(false, "unsupported cache dtype ", dtype);         \
  }

void sparse_decode(const at::Tensor& query, const at::Tensor& key_cache,
                   const at::Tensor& value_cache, const at::Tensor& block_table,
                   const at::Tensor& seq_lens, const at::Tensor& logical_blocks,
                   const at::Tensor& counts, const std::optional<at::Tensor>& heads,
                   const std::optional<at::Tensor>& rule, double scale, at::Tensor out) {
  const Cache cache = make_cache(key_cache, value_cache);
  check_rows(query, out);
  const DecodeArgs args{cache,
                        query.size(1) / cache.num_kv_heads,
                        block_table.const_data_ptr<int32_t>(),
                        seq_lens.const_data_ptr<int32_t>(),
                        logical_blocks.const_data_ptr<int32_t>(),
                        counts.const_data_ptr<int32_t>(),
                        heads_data(heads, cache.num_kv_heads),
                        make_rule(rule, query.size(0), cache.num_kv_heads,
                                  query.size(1) / cache.num_kv_heads),
                        block_table.stride(0),
                        logical_blocks.stride(0),
                        logical_blocks.stride(1),
                        counts.stride(0),
                        static_cast<float>(scale)};
  DISPATCH_CACHE_DTYPE(key_cache.scalar_type(), decode_typed<T>(args, query, out, nullptr, 0));
}

void anchor_decode(const at::Tensor& query, const at::Tensor& key_cache,
                   const at::Tensor& value_cache, const at::Tensor& block_table,
                   const at::Tensor& seq_lens, double scale, const std::optional<at::Tensor>& out,
                   const std::optional<at::Tensor>& block_mass) {
  const Cache cache = make_cache(key_cache, value_cache);
  check_rows(query, out.value_or(query));
  DecodeArgs args{};
  args.cache = cache;
  args.group = query.size(1) / cache.num_kv_heads;
  args.block_table = block_table.const_data_ptr<int32_t>();
  args.seq_lens = seq_lens.const_data_ptr<int32_t>();
  args.table_stride = block_table.stride(0);
  args.scale = static_cast<float>(scale);
  float* mass = nullptr;
  int64_t mass_width = 0;
  if (block_mass.has_value()) {
    TORCH_CHECK(block_mass->is_contiguous() && block_mass->size(0) >= query.size(0) &&
                    block_mass->size(1) == cache.num_kv_heads,
                "block_mass must be a contiguous [num_reqs, num_kv_heads, max_blocks]");
    TORCH_CHECK(block_mass->size(2) >= block_table.size(1) ||
                    block_mass->size(2) * cache.block_size >= at::max(seq_lens).item<int32_t>(),
                "block_mass is narrower than the longest row");
    mass = block_mass->mutable_data_ptr<float>();
    mass_width = block_mass->size(2);
  }
  DISPATCH_CACHE_DTYPE(key_cache.scalar_type(),
                       decode_typed<T>(args, query, out.value_or(at::Tensor()), mass, mass_width));
}

void block_topk(const at::Tensor& block_mass, const at::Tensor& seq_lens, int64_t block_size,
                const at::Tensor& budget_blocks, int64_t sink_blocks, int64_t recent_blocks,
                at::Tensor logical_blocks, at::Tensor counts) {
  TORCH_CHECK(block_mass.is_contiguous() && logical_blocks.stride(2) == 1,
              "block_mass and logical_blocks must be contiguous in their last dimension");
  const int64_t heads = block_mass.size(1), width = logical_blocks.size(2);
  const int32_t* lens = seq_lens.const_data_ptr<int32_t>();
  const int32_t* budgets = budget_blocks.const_data_ptr<int32_t>();
  const float* mass = block_mass.const_data_ptr<float>();
  int32_t* blocks = logical_blocks.mutable_data_ptr<int32_t>();
  int32_t* count_out = counts.mutable_data_ptr<int32_t>();
  std::vector<int32_t> order;
  for (int64_t row = 0; row < seq_lens.size(0); ++row) {
    const int64_t num_blocks = (lens[row] + block_size - 1) / block_size;
    const int64_t count = std::min<int64_t>(num_blocks, std::max(budgets[row], 1));
    TORCH_CHECK(num_blocks <= block_mass.size(2), "a row has ", num_blocks, " blocks, block_mass ",
                block_mass.size(2));
    TORCH_CHECK(count <= width, "a row selects ", count, " blocks, the buffer holds ", width);
    for (int64_t head = 0; head < heads; ++head) {
      topk_row(mass + (row * heads + head) * block_mass.size(2), num_blocks, budgets[row],
               sink_blocks, recent_blocks,
               blocks + row * logical_blocks.stride(0) + head * logical_blocks.stride(1), width,
               order);
      count_out[row * counts.stride(0) + head] = count;
    }
  }
}

void paged_attention(const at::Tensor& query, const at::Tensor& key_cache,
                     const at::Tensor& value_cache, const at::Tensor& query_start_loc,
                     const at::Tensor& seq_lens, const at::Tensor& block_table,
                     const std::optional<at::Tensor>& rule, double scale, at::Tensor out) {
  const Cache cache = make_cache(key_cache, value_cache);
  check_rows(query, out);
  const PrefillArgs args{cache,
                         query.size(1) / cache.num_kv_heads,
                         query_start_loc.const_data_ptr<int32_t>(),
                         seq_lens.const_data_ptr<int32_t>(),
                         block_table.const_data_ptr<int32_t>(),
                         make_rule(rule, seq_lens.size(0), cache.num_kv_heads,
                                   query.size(1) / cache.num_kv_heads),
                         block_table.stride(0),
                         static_cast<float>(scale)};
  DISPATCH_CACHE_DTYPE(key_cache.scalar_type(),
                       paged_attention_typed<T>(args, seq_lens.size(0), query, out));
}

void cache_write(const at::Tensor& key, const at::Tensor& value, at::Tensor key_cache,
                 at::Tensor value_cache, const at::Tensor& slot_mapping) {
  make_cache(key_cache, value_cache);
  TORCH_CHECK(key.scalar_type() == key_cache.scalar_type(), "key and cache dtypes differ");
  TORCH_CHECK(key.stride(2) == 1 && value.stride(2) == 1, "key and value rows must be contiguous");
  if (key.element_size() == 2)
    cache_write_typed<uint16_t>(key, value, key_cache, value_cache, slot_mapping);
  else
    cache_write_typed<uint32_t>(key, value, key_cache, value_cache, slot_mapping);
}

}  // namespace

TORCH_LIBRARY(vllm_ext, m) {
  m.def("cache_write(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
        "Tensor slot_mapping) -> ()");
  m.def("paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, "
        "Tensor query_start_loc, Tensor seq_lens, Tensor block_table, Tensor? rule, "
        "float scale, Tensor(a!) out) -> ()");
  m.def("sparse_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, "
        "Tensor seq_lens, Tensor logical_blocks, Tensor counts, Tensor? heads, Tensor? rule, "
        "float scale, Tensor(a!) out) -> ()");
  m.def("anchor_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, "
        "Tensor seq_lens, float scale, Tensor(a!)? out, Tensor(b!)? block_mass) -> ()");
  m.def("block_topk(Tensor block_mass, Tensor seq_lens, int block_size, Tensor budget_blocks, "
        "int sink_blocks, int recent_blocks, Tensor(a!) logical_blocks, Tensor(b!) counts) -> ()");
}

TORCH_LIBRARY_IMPL(vllm_ext, CPU, m) {
  m.impl("cache_write", &cache_write);
  m.impl("paged_attention", &paged_attention);
  m.impl("sparse_decode", &sparse_decode);
  m.impl("anchor_decode", &anchor_decode);
  m.impl("block_topk", &block_topk);
}
