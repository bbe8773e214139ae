"""Dispatch: tokens to expert slots and back, by a routing decision. Pure functions of arrays."""

from jmoe.dispatch.api import Implementation as Implementation
from jmoe.dispatch.api import Method as Method
from jmoe.dispatch.api import auto_method as auto_method
from jmoe.dispatch.api import combine as combine
from jmoe.dispatch.api import dispatch as dispatch
from jmoe.dispatch.api import resolve as resolve
from jmoe.dispatch.api import rounded as rounded
from jmoe.dispatch.gather import through as through
from jmoe.dispatch.ragged import Ragged as Ragged
