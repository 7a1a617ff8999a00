"""Executes PTX on the CPU: every thread of a launch, to the bit, with each access to memory checked.

A compiled kernel is what a GPU is given, but for the last translation (ptxas). Here it runs with numpy over all threads
at once, on tensors of this process: `parse` reads the text, `Memory` says what a launch may touch, `launch` runs it.

    kernel = parse(text)
    memory = Memory()
    memory.add("x", x.data_ptr(), x.nbytes, itemsize=4, writable=True)
    launch(kernel, blocks=3, arguments=[x.data_ptr(), 1000], memory=memory)

What is executed is what NVIDIA's PTX ISA defines (version 9.0, sections 9.7.1 to 9.7.13). What it does not define to
the bit (approximate roots and quotients, flushing) and what is not known here is an error that names the line; so is
an access out of bounds, without permission, off its alignment, or in a race with another thread.

Not modelled: time, caches, the order of threads (a fixed one is taken; races are errors), ptxas.
"""

from .errors import PtxError
from .machine import Report, launch, translated
from .memory import Memory
from .program import Kernel, parse

__all__ = ["Kernel", "Memory", "PtxError", "Report", "launch", "parse", "translated"]
