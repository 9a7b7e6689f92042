"""The commands of ``python -m flashcute``, one module each, and what they share.

options     argument types, and ForwardConfig from arguments
table       text tables and units
kits        the array libraries: arrays, clocks and memory meters of NumPy, torch and CuPy
problem     sizes, random inputs, errors against fp64, the bounds on them
peers       the implementations that flashcute is compared with
timing      samples in interleaved rounds
provenance  what a line of measurements says about its origin
cases       one problem from arguments, for io and profile
ncu         Nsight Compute: finding it, running it, reading its CSV
"""
