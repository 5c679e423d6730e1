// Numbers as registers hold them: 64 bits, of which narrower types use the lowest.
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

static inline float F(u64 x) { u32 low = (u32)x; float f; memcpy(&f, &low, 4); return f; }
static inline double D(u64 x) { double f; memcpy(&f, &x, 8); return f; }
// The hardware's arithmetic has one NaN, whatever the NaNs that it is given.
static inline u32 fbits(float f) { u32 x; memcpy(&x, &f, 4); return f == f ? x : 0x7fffffffu; }
static inline u64 dbits(double f) { u64 x; memcpy(&x, &f, 8); return f == f ? x : 0xfff8000000000000ull; }
static inline float ftz(float f) { return fabsf(f) < 0x1p-126f ? copysignf(0.0f, f) : f; }

// Rounded to nearest even; all NaNs become the one that the hardware gives.
static inline u16 to_bfloat(float f) {
  u32 x = fbits(f);
  return f != f ? 0x7fff : (u16)((x + 0x7fff + (x >> 16 & 1)) >> 16);
}
static inline u16 to_half(float f) { _Float16 h = (_Float16)f; u16 x; memcpy(&x, &h, 2); return f != f ? 0x7fff : x; }
static inline float of_half(u16 x) { _Float16 h; memcpy(&h, &x, 2); return (float)h; }

static inline u64 bit_field(u64 x, u32 start, u32 length, u32 width, int is_signed) {
  start &= 255, length &= 255;
  u32 top = start + length - 1 < width - 1 ? start + length - 1 : width - 1;
  u64 sign = is_signed && length ? x >> top & 1 : 0;
  u64 field = start < width ? x >> start : 0, kept = start < width ? top - start + 1 : 0;
  if (length == 0) return 0;
  if (kept >= 64) return field;
  return (field & ((1ull << kept) - 1)) | (sign ? ~0ull << kept : 0);
}

static inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
  u64 bytes = (u64)b << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    u32 choice = selector >> 4 * i & 15, byte = bytes >> 8 * (choice & 7) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;  // the sign, repeated
    result |= byte << 8 * i;
  }
  return result;
}

// Comparisons are numbered as program.py numbers them; UNORDERED is added where NaN makes them true.
enum { EQ, NE, LT, LE, GT, GE, ONE_NAN, NO_NAN, UNORDERED = 16 };
#define COMPARE(NAME, TYPE)                                                 \
  static inline u64 NAME(TYPE a, TYPE b, i32 comparison) {                  \
    int nan = a != a || b != b;                                             \
    if (nan && comparison & UNORDERED) return 1;                            \
    switch (comparison & 15) {                                              \
      case EQ: return a == b;                                               \
      case NE: return !nan && a != b;                                       \
      case LT: return a < b;                                                \
      case LE: return a <= b;                                               \
      case GT: return a > b;                                                \
      case GE: return a >= b;                                               \
      case ONE_NAN: return nan;                                             \
      default: return !nan;                                                 \
    }                                                                       \
  }
COMPARE(compare_float, float)
COMPARE(compare_double, double)
COMPARE(compare_signed, i64)
COMPARE(compare_unsigned, u64)

static inline u64 random_bits(u64 *state) {  // splitmix64
  u64 z = (*state += 0x9e3779b97f4a7c15ull);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}
