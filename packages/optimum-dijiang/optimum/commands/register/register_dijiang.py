"""Read by every start of optimum-cli: it imports nothing but optimum's own command line."""

from ..export.base import ExportCommand
from ..export.dijiang import DijiangExportCommand

REGISTER_COMMANDS = [(DijiangExportCommand, ExportCommand)]
