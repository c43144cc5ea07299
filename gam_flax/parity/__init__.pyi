from .comparison import assert_parity as assert_parity
from .comparison import compare as compare
from .report import ParityReport as ParityReport
from .report import Row as Row
from .report import Unmatched as Unmatched
