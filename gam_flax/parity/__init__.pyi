from .compare import ParityReport as ParityReport
from .compare import assert_parity as assert_parity
from .compare import compare as compare
