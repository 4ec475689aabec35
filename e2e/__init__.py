"""End-to-end: the lab (`e2e/lab`, package `e2e.netlab`), its Kubernetes API, and the scenarios."""
