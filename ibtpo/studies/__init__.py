"""Studies: the paper's tables re-run as matrices of methods, seeds and tasks at an equal budget (``ibtpo study``).

matrix      a study's YAML -> cells, each a process's work with a name that its settings decide
folders     what is where
run         cells over processes; what is done is kept, what fails is recorded
cell        the process of one cell
measure     what a cell of each kind does
results     the cells' results -> a value a seed and column
tables      ... -> a table with intervals: terminal, CSV, markdown
figures     learning curves and diagnostics
page        all of it on one self-contained page
"""
