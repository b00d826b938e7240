"""The built-in gate: ``pytest --pyargs pytest_gpulayout.gates --gpu-layout=tp2 --gpu-model=...``."""
