"""Studies: the paper's tables re-run as matrices of methods, seeds and tasks at an equal budget (``ibtpo study``).

matrix      a study's YAML -> cells, one process each, named after a hash of their settings
folders     paths of a study's files
run         running cells in processes; results are kept, failures recorded
cell        the process of one cell
measure     the work of a cell of each kind
results     the cells' results -> a value for each seed and column
tables      these values -> tables with intervals: terminal, CSV, markdown
figures     learning curves and diagnostics
page        a self-contained page with all of these
"""
