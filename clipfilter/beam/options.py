"""Which Beam runner runs a pipeline, and with which of Beam's own options."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clipfilter.errors import RefusedError
from clipfilter.storage import normalise

if TYPE_CHECKING:
    import apache_beam as beam

#: Runs in this process, or in worker processes of this machine.
DIRECT = "DirectRunner"
Value = str | int | float | bool | list[str]


@dataclass(frozen=True)
class BeamOptions:
    """A runner by its Beam name, and Beam's pipeline options by theirs, without dashes: {"direct_num_workers": 2}."""

    runner: str = DIRECT
    options: dict[str, Value] = field(default_factory=dict)

    def flags(self) -> list[str]:
        """The options as Beam's command line takes them. Raises RefusedError for a name that is none."""
        found = []
        for name, value in self.options.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "runner":
                raise RefusedError(
                    f"{name!r} is not the name of a Beam option; write its name without dashes (the runner has a key of its own)."
                )
            for each in value if isinstance(value, list) else [value]:
                if each is True:
                    found.append(f"--{name}")
                elif each is not False:
                    found.append(f"--{name}={each}")
        return found

    def pipeline(self) -> beam.Pipeline:
        """An empty pipeline for the runner.

        Raises RefusedError where Beam is missing, or does not know the runner or an option.
        """
        try:
            import apache_beam as beam
            from apache_beam.options.pipeline_options import PipelineOptions
        except ImportError as error:
            raise RefusedError(
                f"Beam is not installed ({error}); install it with `pip install clipfilter[beam]`."
            ) from error
        flags = self.flags()
        known = PipelineOptions([]).get_all_options()
        for name in self.options:
            if name not in known and name.removeprefix("no_") not in known:
                raise RefusedError(f"Beam has no option {name!r}; see docs/guide/beam.md for the usual ones.")
        options = PipelineOptions(flags)
        try:
            return beam.Pipeline(runner=_direct(options) if self.local else self.runner, options=options)
        except (ValueError, ImportError) as error:
            raise RefusedError(f"the Beam runner {self.runner!r} cannot be used: {error}") from error

    @property
    def local(self) -> bool:
        """True when the work stays on this machine."""
        return self.runner == DIRECT

    def refuse_unshared(self, url: str, what: str) -> None:
        """A plain path means another file on another machine: refuse before work begins.

        Whoever writes file:// says that it is mounted on every worker.
        """
        if not self.local and "://" not in url:
            raise RefusedError(
                f"{what} {normalise(url)} is a path of this machine, but {self.runner} works elsewhere; put it on storage its "
                "workers reach (s3://, gs://, ...), or pass file:///shared/path for a mounted network disk."
            )


def _direct(options: Any) -> Any:
    """Beam's own Python runner. The one named DirectRunner would first try to download another (docs/decisions/0026)."""
    from apache_beam.portability.api import beam_provision_api_pb2
    from apache_beam.runners.portability.fn_api_runner import fn_runner
    from apache_beam.runners.portability.portable_runner import JobServiceHandle

    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    info = beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded)
    return fn_runner.FnApiRunner(provision_info=fn_runner.ExtendedProvisionInfo(info))
