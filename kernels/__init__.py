"""The operations behind the pseudo-labels, one a file: formula, reference, kernels, public function.

Nothing here imports the rest of DMX, and importing this package does no work.
"""
