// The arithmetic is IEEE-754 with subnormals, whatever the calling thread has set.
//
// Include inside the namespace of one instruction set (see mover.inc), after <xmmintrin.h>.

class DefaultRounding {
#if defined(__x86_64__)
 public:
  DefaultRounding() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultRounding() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
 public:
  DefaultRounding() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" ::"r"(uint64_t(0)));
  }
  ~DefaultRounding() { __asm__ volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
 public:
  DefaultRounding() {}
#endif
};
