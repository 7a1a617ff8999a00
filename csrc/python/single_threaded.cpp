// Since glibc 2.32 libstdc++ asks it whether a process has one thread, and then counts references without atomics. One
// of our own, which always says that there may be more, lets the libraries run with an older glibc too.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
