// The records that native code, kernels and Python share, by position (wd_kernels/table/layout.py).
//
// A segment is one tensor of a bucket, or a run of neighbours in a flat buffer: what a step may change of it
// (`Moving`), and its place, which stays for many steps. A chunk is a stretch of one segment; a launch steps a list of
// them.
#pragma once

#include <cstdint>

// The operators' namespace in torch.ops: a build that vendors this package chooses another.
#ifndef WD_NAMESPACE
#define WD_NAMESPACE wd_kernels
#endif
// Expands it before torch's macros see it: those of torch 2.10 take a name as it is written.
#define WD_EXPANDED(macro, ...) macro(__VA_ARGS__)
#define WD_LITERAL(x) #x
#define WD_TEXT(x) WD_LITERAL(x)

#ifdef __CUDACC__
#define WD_HOST_DEVICE __host__ __device__
#define WD_UNROLL _Pragma("unroll")
#define WD_ROLLED _Pragma("unroll 1")
#else
#define WD_HOST_DEVICE
#define WD_UNROLL
#define WD_ROLLED
#endif

namespace wd {

enum Role : int { kParam = 0, kGrad = 1, kState = 2 };
constexpr int kMaxRoles = 16;
constexpr int kPadding = 32;    // origins are multiples of it
constexpr int kScaled = 32;     // neighbours that share a scale, where states are in 8 bits
constexpr int kBlock = 1024;    // elements that a sum adds up in the arithmetic type; chunks are multiples of it
constexpr int kNeighbours = 8;  // of them that are added up first

// The words of an exact sum (sums.h). Python reads them too (wd_kernels/sums.py).
constexpr int kDigits = 68, kInfinities = 68, kNaNs = 69, kSumWords = 70;

// What a step may change of a segment.
struct Moving {
  void* grad;
  int64_t numel;    // elements in this step: 0 without a gradient
  int64_t row;      // index into the matrix of scalar rows; where gradients are added up 1: nothing is there yet
  int64_t aligned;  // 1: every address is a multiple of 16 bytes
};
constexpr int64_t kMovingWords = 4;
static_assert(sizeof(Moving) == kMovingWords * sizeof(int64_t), "layout.py writes 4 words");

// The words of a place: the segment's origin (its first element's number among all of the optimizer's), where the sums
// of its blocks go, and the marks of what a step changes (a bit an element, in words of 32), then the address of every
// role but the gradient: parameter, states, what else a pass writes, and the parts of formats that have one.
enum PlaceWord : int { kOrigin = 0, kOutput = 1, kMarks = 2, kAddresses = 3 };
constexpr int kMarked = 32;  // elements of a word of marks

// The word that holds the address of a role. Of internal linkage, as it is compiled for several instruction sets.
WD_HOST_DEVICE static inline int address_word(int role) { return kAddresses + (role == kParam ? 0 : role - 1); }

// What every launch reads from memory besides its segments and rows.
struct Control {
  double grad_factor;
  double skip;
};

// The storage format of one role. wd_kernels/formats.py holds the same codes.
enum FormatCode : int64_t {
  kPart = 0,  // of the format of another role
  kFloat64 = 1,
  kFloat32 = 2,
  kBFloat16 = 3,
  kFloat16 = 4,
  kBFloat16Stochastic = 5,
  kSplit32 = 6,
  kSplit24 = 7,
  kSplit24Stochastic = 8,
  kBFloat16Copy = 9,
  kFloat16Copy = 10,
  kInt8 = 11,
  kInt8Stochastic = 12,
  kUint8 = 13,
  kUint8Stochastic = 14,
};

// What a launch is given; all of it lies on the device that steps.
struct Launch {
  const int64_t* chunks;  // the segment in the low half of a word, above it which of the segment's chunks
  const int64_t* places;
  const Moving* moving;
  const double* rows;
  const Control* control;
  int32_t place_words;
  int32_t row_width;
  int32_t chunk_size;
};

// What begins a step on a device that counts by itself, and lets it be skipped there: all of it lies on that device.
struct Begin {
  int64_t* sums;            // exact sums [copies, slots, kSumWords]; emptied when they are read
  int64_t* totals;          // [groups + 2, kSumWords]: of each group, of all, of those without a limit of their own
  const int64_t* slots_of;  // [groups + 1]: where those of each group begin
  const double* limits;     // LimitWord; then the own limit of each group, NaN where it has none
  const float* grad_scale;  // of one element each
  const float* found_inf;
  const double* settings;   // SettingWord, of each group
  const int64_t* sources;   // of each setting where it lies, 0: it is a number; then SourceWord
  const int64_t* keys;      // of each row: its group, a parameter that has its count
  const int64_t* active;    // of each parameter: has it a gradient?
  float* steps;             // and these are counted
  float* fresh;             // 1 until a step that makes a state of it is taken
  int64_t* schedule_steps;  // of each group with a table, completed
  double* etas;             // of each group with a table, in the last step that was counted
  double* groups;           // the first scalars of a row, and its last, of each group
  double* rows;
  double* clips;  // of each group
  Control* control;
  double* found;  // the norm, and whether the step is skipped
  double* last;   // [2, kBlock]: norms and losses, by which spikes are told, in rings
  int64_t* seen;  // [2]: how many each has been given
  const float* loss;
  int32_t copies, slots, of_groups, of_rows, of_params;
};

// The settings of a group, in float64; those of the rule follow. A source is an address: of a float64 where it is odd,
// less 1, else of a float32. `kBaseLr`: not 0 where eta is lr over it.
enum SettingWord : int {
  kLr = 0,
  kEta = 1,
  kWeightDecay = 2,
  kDecayMode = 3,
  kBaseLr = 4,
  kSeed = 5,
  kDecayCenter = 6,
  kDecayThreshold = 7,
  kOwnSettings = 8
};

// After the sources: the schedule's table, float64 [2, length] of eta and of what multiplies the weight decay (0: it
// has none), its length, and whether it goes on after it: such a step is skipped. Then the table of what averages keep
// in steps 1, 2, ..., float64 [length] (0: there is no average), and its length; of a mean 1, and how many steps come
// before its second one.
enum SourceWord : int {
  kTable = 0,
  kTableLength = 1,
  kEndless = 2,
  kAverageTable = 3,
  kAverageLength = 4,
  kSourceWords = 5
};

// Of the limits of a step.
enum LimitWord : int {
  kMeasures = 0,
  kMaxNorm = 1,
  kSkipNonfinite = 2,
  kSigma = 3,   // infinite: no step is skipped for a spike
  kWindow = 4,  // how many of the rings are used
  kHasLoss = 5,
  kHasOwn = 6,  // some group has a limit of its own
  kOwnLimits = 7
};

}  // namespace wd
