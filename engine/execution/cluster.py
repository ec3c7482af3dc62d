"""Ray for the length of a command: a running cluster that is joined, or one started here and ended here."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ka2l.errors import ConfigError, first_line

if TYPE_CHECKING:
    from engine.config import RayConfig

_CONNECT_TIMEOUT_S = 10.0
#: The packages that a joined cluster is sent, so that it runs this code and not what is installed there.
_PACKAGES = ("ka2l", "actors", "engine")


class RaySession:
    """Context manager: joins a cluster or starts Ray; ends what it started.

    Args:
        config: where the cluster is.
        log_path: file for what native libraries write to descriptor 2 meanwhile.

    Raises:
        ConfigError: no cluster answers at the address, or it has another version of Ray or Python.
    """

    def __init__(self, config: RayConfig, log_path: str) -> None:
        self.config = config
        self.log_path = log_path
        self.stderr: Any = None

    def __enter__(self) -> str:
        """Returns the address at which other processes join the same Ray."""
        address = cluster_address(self.config)
        self._divert_native_chatter()
        try:
            self._connect(address)
            import ray

            return str(ray.get_runtime_context().gcs_address)
        except BaseException:
            self.__exit__()
            raise

    def _connect(self, address: str | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Ray makes its workers yield to everything else; here they are the work.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # What `ray job submit --runtime-env` names stays, with this code added to it.
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
        import ray

        terminated = signal.getsignal(signal.SIGTERM)  # Ray puts a handler of its own there
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            # Everything Ray serves stays on this machine.
            ray.init(address="local", num_cpus=self.config.num_cpus, include_dashboard=False,
                     _node_ip_address="127.0.0.1", **quiet)  # fmt: skip
        else:
            try:
                ray.init(address=address, runtime_env={"py_modules": package_folders()}, **quiet)
            except RuntimeError as error:
                raise _explained(error, address) from error
            except (ray.exceptions.AuthenticationError, ConnectionError) as error:
                # Something answers there, so it is mostly the token that is wrong.
                raise ConfigError(
                    f"the Ray cluster at {address} refuses this command's connection: {first_line(error)}",
                    hint="Does it ask for a token? Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the "
                    "cluster's token (~/.ray/auth_token where it was started).",
                ) from error
        if terminated is not None:
            signal.signal(signal.SIGTERM, terminated)
        logging.getLogger("ray").setLevel(logging.ERROR)

    def _divert_native_chatter(self) -> None:
        """Native libraries write to descriptor 2 whatever Python's logging says; people read ``sys.stderr``."""
        sys.stderr.flush()
        self.stderr = sys.stderr
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        log = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 2)
        os.close(log)

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()
        os.dup2(sys.stderr.fileno(), 2)
        sys.stderr.close()
        sys.stderr = self.stderr


def package_folders() -> list[str]:
    """Folders of this distribution's packages, as they are imported here."""
    return [str(Path(str(importlib.import_module(name).__file__)).parent) for name in _PACKAGES]


def _explained(error: RuntimeError, address: str) -> Exception:
    """Ray's complaint about versions in our words; any other error as it is."""
    if "ersion mismatch" not in str(error):
        return error
    lines = [line.strip() for line in str(error).splitlines() if "Ray:" in line or "Python:" in line]
    there, here = (" and ".join(part) for part in (lines[:2], lines[2:4]))
    return ConfigError(
        f"the Ray cluster at {address} has {there}; this command has {here}",
        hint="Run ka2l in the cluster's environment (cluster/README.md), or set ray.address=local to start Ray here.",
    )


def cluster_address(config: RayConfig) -> str | None:
    """Address of a cluster meant to be joined: the config's, ``$RAY_ADDRESS``, or what ``ray start`` left here.

    None where Ray is to be started here. Not ``ray.init(address="auto")``: that joins the private Ray of any other
    program on the machine, and dies with it.

    Raises:
        ConfigError: nothing answers there. Ray would try for minutes.
    """
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    started = file.read_text().strip() if file.is_file() else ""
    wanted = os.environ.get("RAY_ADDRESS") if config.address == "auto" else config.address
    address = wanted or started
    if address in ("", "local"):
        return None
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdecimal():
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        if not wanted:  # left behind by a cluster that has ended
            return None
        raise ConfigError(
            f"no Ray cluster answers at {address}: {error}",
            hint="Check ray.address (or RAY_ADDRESS), or set ray.address=local to start Ray here.",
        ) from error
    return address
