"""The operations of `dmx.kernels` for machines without a GPU: numba and NumPy, the same results.

Formulas, references and public functions stand one folder up, in the file of the same name.
"""
