"""PTX, the code that a compiler made for a GPU, run instruction by instruction on the CPU.

The interpreter of Triton and the emulator of CUDA show what our sources say. What the compilers
made of them is another thing: layouts, vectorised and pipelined copies, fragments of tensor cores,
barriers, kernels for the strides and alignments of a call. This package runs that.

    kernels = text.parse(ptx)          # the program
    machine.Program(kernels["name"])   # made ready to run
        .launch(grid, warps, arguments, memory, shared_bytes)

What it watches: each access to global memory lies in the storage of a tensor of the call and is
aligned; between two warps' accesses to a place in shared memory, one of them a write, stands a
barrier; nothing touches what a copy (`cp.async`) is on its way to, and what copies bring and
products (`wgmma`) read comes as late as their waits allow; all lanes that must be there are where
a warp acts as one.

What it can't show: what ptxas makes of the PTX, speed, blocks that run at the same time, lanes of
one warp that race, a missing fence. The approximate instructions (`ex2.approx`, `div.full`, ...)
give the rounded exact result here, and a sum of a tensor core is added up in double precision and
rounded once.
"""
