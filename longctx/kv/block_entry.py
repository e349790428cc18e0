"""The columns of a block table: which rows of which page hold a sequence's tokens, and where.

A table [entries, ENTRY_COLUMNS] has one entry for each run of rows that share a page. An entry
names `ROWS` rows of the packed page `PAGE`, from `ROW_BEGIN` on. They are at position
`FIRST_POSITION` and the ones after it, and their keys were encoded `ROTATION` positions before
that: 0 for all but the tokens of modules that serve at another place than they were computed at.

Worked example: 70 tokens of a module that was computed at position 0 and serves at 100 are two
entries, (PAGE 7, ROW_BEGIN 0, ROWS 64, FIRST_POSITION 100, ROTATION 100) and
(9, 0, 6, 164, 100).
"""

import numpy as np
from numpy.typing import NDArray

PAGE, ROW_BEGIN, ROWS, FIRST_POSITION, ROTATION = range(5)
ENTRY_COLUMNS = 5

Entries = NDArray[np.int64]  # [entries, ENTRY_COLUMNS]
