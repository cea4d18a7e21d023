"""Triton kernels, one file per op; Triton itself is imported by those files only."""

if __name__ != "errseg.kernels":
    raise ImportError(f"the folder `kernels` is the package errseg.kernels, not {__name__}: import errseg.kernels")
