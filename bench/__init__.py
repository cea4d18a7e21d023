"""Benchmarks: one registry of cases, one runner, results/ with the machine they were measured on."""

if __name__ != "errseg.bench":
    raise ImportError(f"the folder `bench` is the package errseg.bench, not {__name__}: import errseg.bench")
