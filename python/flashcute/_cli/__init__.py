"""The commands of ``python -m flashcute``, one module each, and what they share.

options     argument types, and ForwardConfig from arguments
table       text tables and units
kits        the array libraries: arrays, clocks and memory meters of NumPy, torch and CuPy
problem     sizes, random inputs, errors against fp64, the bounds on them
peers       the implementations that flashcute is compared with
presets     the attention of models, as cases of bench
timing      samples in interleaved rounds
progress    what a long run says of itself
provenance  what a line of measurements says about its origin
recorded    files of such lines: written, read, checked, selected
charts      recorded lines as charts, which are data
drawing     charts as pictures, by matplotlib
traffic     bytes that attention moves, in theory
cases       one problem from arguments, for io and profile
ncu         Nsight Compute: finding it, running it, reading its CSV
"""
