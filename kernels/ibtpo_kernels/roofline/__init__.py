"""How far each op is from the machine's limits, and from its peers: `python -m ibtpo_kernels.roofline --help`.

`catalog` lists the problems (op, shape, dtype, work, contenders), `runner` checks and times one, `roofs` measures the
machine, `rows`, `table` and `plot` report the results. The ops import nothing from here.
"""
