// Linear layers of integers with `vpdpwssd`: a panel's outputs and two inputs in one instruction.
#ifdef LONGCTX_SIMDE
#include "simd/simde.h"
#else
#include <immintrin.h>
#endif

#include <bit>
#include <cstring>
#include <limits>

#include "simd/bfloat16.h"
#include "linear/integers.h"

namespace {

using namespace longctx;

constexpr int64_t AHEAD_BYTES = 1024; // as in linear/tile.h
constexpr float SMALLEST = 1e-30f;    // groups of smaller numbers are zero
constexpr int64_t OCTET = 8;          // inputs whose codes are unpacked at once
#ifdef LONGCTX_SIMDE
constexpr int TILE_ROWS = 2; // in software more would take a compiler ten minutes
#else
constexpr int TILE_ROWS = 12; // 24 sums, 4 weights
#endif

__m512 load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
__m512 load_int8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}

__m256 eight(const float* x) { return _mm256_loadu_ps(x); }
__m256 eight(const uint16_t* x) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16));
}

int32_t across(__m256i x, auto operation) {
    alignas(32) int32_t lanes[8];
    _mm256_store_si256((__m256i*)lanes, x);
    int32_t all = lanes[0];
    for (int i = 1; i < 8; ++i) all = operation(all, lanes[i]);
    return all;
}

template <class T>
void round_row(const T* x, int64_t inputs, const IntegerRows& to) {
    constexpr int32_t INFINITE = 0x7f800000;
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (int64_t begin = 0; begin < inputs; begin += GROUP_INPUTS) {
        __m256 numbers[4];
        __m256i largest = _mm256_setzero_si256();
        for (int i = 0; i < 4; ++i) {
            numbers[i] = eight(x + begin + 8 * i);
            // As integers, magnitudes are in the same order, and not-a-number is beyond infinity
            largest = _mm256_max_epi32(
                largest, _mm256_and_si256(_mm256_castps_si256(numbers[i]), magnitude));
        }
        const int32_t bits = across(largest, [](int32_t a, int32_t b) { return a > b ? a : b; });
        const float most = std::bit_cast<float>(bits);
        const bool finite = bits < INFINITE, some = finite && most >= SMALLEST;
        const __m256 inverse = _mm256_set1_ps(some ? float(LARGEST_STEP) / most : 0.0f);
        const auto stepped = [&](__m256 of) {
            const __m256i steps = _mm256_cvtps_epi32(_mm256_mul_ps(of, inverse));
            return some ? steps : _mm256_setzero_si256();
        };
        __m256i sums = _mm256_setzero_si256();
        for (int i = 0; i < 2; ++i) {
            const __m256i steps = _mm256_permute4x64_epi64(
                _mm256_packs_epi32(stepped(numbers[2 * i]), stepped(numbers[2 * i + 1])), 0xd8);
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(steps, _mm256_set1_epi16(1)));
            constexpr int ORDER = 0xd8; // 0, 2, 1, 3
            _mm256_storeu_si256(
                (__m256i*)(to.steps + begin + 16 * i),
                _mm256_shufflelo_epi16(_mm256_shufflehi_epi16(steps, ORDER), ORDER));
        }
        const int64_t group = begin / GROUP_INPUTS;
        const int32_t total = across(sums, [](int32_t a, int32_t b) { return a + b; });
        const float scale = some ? most / float(LARGEST_STEP) : 0.0f;
        to.totals[group] = total;
        // What is no number makes all results of the row so
        to.scales[group] = finite ? scale : std::numeric_limits<float>::quiet_NaN();
        to.weighted[group] = to.scales[group] * float(total);
    }
}

void round(const void* x, bool bfloat16, int64_t inputs, const IntegerRows& to) {
    bfloat16 ? round_row((const uint16_t*)x, inputs, to) : round_row((const float*)x, inputs, to);
}

// One panel of weights.
template <Storage STORAGE>
struct Panel {
    static constexpr GroupLayout LAYOUT = group_layout(STORAGE);
    static constexpr int64_t GROUP = LAYOUT.inputs;
    static_assert(GROUP_INPUTS % GROUP == 0 && (GROUP == GROUP_INPUTS || !LAYOUT.minimum));
    // What a code of 4 bits is more than its number, where there is no minimum.
    static constexpr int OFFSET = LAYOUT.bits == 4 && !LAYOUT.minimum ? 8 : 0;
    const uint8_t* weights;

    Panel(const IntegerJob& job, int64_t panel)
        : weights((const uint8_t*)job.weight +
                  panel * (job.inputs / LAYOUT.block) * LAYOUT.block_bytes()) {}
    const uint8_t* group(int64_t begin) const { return weights + LAYOUT.place(begin); }
    // Scales, or minima: number 0 and 1.
    __m512 numbers(int64_t begin, int64_t which) const {
        const uint8_t* own = group(begin) + which * PANEL * LAYOUT.scale_bytes();
        if constexpr (LAYOUT.blocks()) {
            const uint8_t* block = weights + begin / LAYOUT.block * LAYOUT.block_bytes();
            return _mm512_mul_ps(load_half((const uint16_t*)block + which * PANEL),
                                 load_int8((const int8_t*)own));
        } else {
            return load_half((const uint16_t*)own);
        }
    }
    // Weights of inputs 0 and 2, 1 and 3, 4 and 6, 5 and 7, side by side.
    static void unpack(const uint8_t* codes, __m512i* pairs) {
        const __m512i first = _mm512_loadu_si512(codes);
        if constexpr (LAYOUT.bits == 8) {
            const __m512i second = _mm512_loadu_si512(codes + 4 * PANEL);
            pairs[0] = _mm512_srai_epi16(_mm512_slli_epi16(first, 8), 8);
            pairs[1] = _mm512_srai_epi16(first, 8);
            pairs[2] = _mm512_srai_epi16(_mm512_slli_epi16(second, 8), 8);
            pairs[3] = _mm512_srai_epi16(second, 8);
        } else {
            const __m512i low = _mm512_set1_epi16(15);
            pairs[0] = _mm512_and_si512(first, low);
            pairs[1] = _mm512_and_si512(_mm512_srli_epi16(first, 8), low);
            pairs[2] = _mm512_and_si512(_mm512_srli_epi16(first, 4), low);
            pairs[3] = _mm512_srli_epi16(first, 12);
        }
    }
};

// Writes the results of one row and panel.
void put(const IntegerJob& job, int64_t row, int64_t panel, __m512 sums) {
    const int64_t first = panel * PANEL, place = row * job.outputs + first;
    const int64_t count = first + PANEL <= job.outputs ? PANEL : job.outputs - first;
    if (job.bias) sums = _mm512_add_ps(sums, _mm512_loadu_ps(job.bias + first));
    alignas(64) float wide[PANEL];
    _mm512_store_ps(wide, sums);
    if (!job.bfloat16) {
        std::memcpy((float*)job.y + place, wide, count * sizeof *wide);
        return;
    }
    uint16_t narrow[PANEL];
    for (int64_t i = 0; i < PANEL; ++i) narrow[i] = rounded(wide[i]);
    std::memcpy((uint16_t*)job.y + place, narrow, count * sizeof *narrow);
}

template <Storage STORAGE, int ROWS>
void tile(const IntegerJob& job, int64_t row, int64_t panel) {
    using P = Panel<STORAGE>;
    const P of(job, panel);
    const int64_t groups = job.inputs / GROUP_INPUTS;
    const int16_t* x = job.x.steps + row * job.inputs;
    __m512 sums[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) sums[r] = _mm512_setzero_ps();
    for (int64_t begin = 0; begin < job.inputs; begin += P::GROUP) {
        const uint8_t* codes = of.group(begin) + P::LAYOUT.codes_at();
        for (int64_t byte = 0; byte < P::LAYOUT.bytes(); byte += 64)
            __builtin_prefetch(codes + AHEAD_BYTES + byte);
        const int64_t place = row * groups + begin / GROUP_INPUTS;
        __m512i dots[ROWS];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
            dots[r] = P::OFFSET ? _mm512_set1_epi32(-P::OFFSET * job.x.totals[place + r * groups])
                                : _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int64_t octet = 0; octet < P::GROUP; octet += OCTET) {
            __m512i weights[4];
            P::unpack(codes + octet * PANEL * P::LAYOUT.bits / 8, weights);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    int32_t pair;
                    std::memcpy(&pair, x + r * job.inputs + begin + octet + 2 * i, sizeof pair);
                    dots[r] = _mm512_dpwssd_epi32(dots[r], weights[i], _mm512_set1_epi32(pair));
                }
        }
        const __m512 scale = of.numbers(begin, 0);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
            sums[r] = _mm512_fmadd_ps(
                _mm512_cvtepi32_ps(dots[r]),
                _mm512_mul_ps(scale, _mm512_set1_ps(job.x.scales[place + r * groups])), sums[r]);
        if constexpr (P::LAYOUT.minimum) {
            const __m512 minimum = of.numbers(begin, 1);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r)
                sums[r] = _mm512_fmadd_ps(
                    minimum, _mm512_set1_ps(job.x.weighted[place + r * groups]), sums[r]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) put(job, row + r, panel, sums[r]);
}

// Calls `tile` for a number of rows that is known only at run time.
template <Storage STORAGE, int ROWS = TILE_ROWS>
void tiles(const IntegerJob& job, int64_t row, int64_t rows, int64_t panel) {
    if constexpr (ROWS > 0) {
        if (rows < ROWS) return tiles<STORAGE, ROWS - 1>(job, row, rows, panel);
        tile<STORAGE, ROWS>(job, row, panel);
    }
}

template <Storage STORAGE>
void run(const IntegerJob& job) {
    for (int64_t panel = job.first_panel; panel < job.last_panel; ++panel)
        for (int64_t row = 0; row < job.rows; row += TILE_ROWS)
            tiles<STORAGE>(job, row, row + TILE_ROWS < job.rows ? TILE_ROWS : job.rows - row, panel);
}

} // namespace

const longctx::IntegerKernels longctx::integer_kernels = {
    round,
    {nullptr, nullptr, run<Storage::bytes_half>, run<Storage::bytes_half_minimum>,
     run<Storage::bytes_block_minimum>, run<Storage::bytes_block>, run<Storage::nibbles_half>,
     run<Storage::nibbles_half_minimum>, run<Storage::nibbles_block_minimum>}};
