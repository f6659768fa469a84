"""Gymnasium environments as robots: `--task gym:Pendulum-v1`. Needs `pip install relod[gym]`."""
