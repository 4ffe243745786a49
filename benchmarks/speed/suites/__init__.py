"""The suites: each has `cases(options)`, what it compares, and `measure(case, options)`, how. One module a suite."""
