import runtime  # noqa: F401 - first: it switches off what libraries report
