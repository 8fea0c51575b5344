"""What the README claims, measured: pytest-benchmark suites, results by machine, table writer."""
