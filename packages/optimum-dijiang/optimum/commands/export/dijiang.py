"""optimum-cli export dijiang: `dijiang export`, with its options, errors and exit status."""

import sys
from argparse import REMAINDER, ArgumentParser

from ..base import BaseOptimumCLICommand, CommandInfo


class DijiangExportCommand(BaseOptimumCLICommand):
    """`optimum-cli export dijiang CHECKPOINT BUNDLE [options of dijiang export]`."""

    COMMAND = CommandInfo(name="dijiang", help="Export a DiJiang checkpoint to an ONNX bundle.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Two folders; what follows is read by dijiang."""
        parser.add_argument("checkpoint", metavar="CHECKPOINT", help="Folder, or a name of the Hub.")
        parser.add_argument("output", metavar="BUNDLE", help="Folder to be written.")
        parser.add_argument("options", nargs=REMAINDER, help="Those of: dijiang export --help")

    def run(self) -> None:
        """Export, and exit as `dijiang export` does."""
        from dijiang.cli import main

        given = [*self.args.options, "--output", self.args.output, "--", self.args.checkpoint]
        sys.exit(main(["export", *given], prog_name="optimum-cli", standalone_mode=True))
