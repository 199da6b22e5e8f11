"""Samplers: schedules and solvers that become tables of weights, and the one step that applies them."""

from .config import SamplerDefaults as SamplerDefaults
from .config import read_scheduler as read_scheduler
from .table import MAX_STEPS as MAX_STEPS
from .table import SAMPLERS as SAMPLERS
from .table import Row as Row
from .table import SamplerState as SamplerState
from .table import Table as Table
from .table import add_noise as add_noise
from .table import first_used_step as first_used_step
from .table import init_state as init_state
from .table import make_table as make_table
from .table import stack_tables as stack_tables
from .table import step as step
from .table import table_row as table_row
