"""A cell to run a script in: its own namespaces, an empty read-only root, no rights, hard limits. A script itself.

Run as ``python -I -S cell.py SETTINGS``, with SETTINGS a JSON object (see ``Cell`` in ``sandbox.py``); it imports the
standard library alone. Three processes stand in a row:

* the warden (this one), outside: passes on how the cell ended and, told to stop, kills it and waits until it is gone;
* the keeper, process 1 of the cell's own process namespace: when it dies, the kernel kills all that is in there, and
  nobody in there can kill it;
* the inmate, which gives up every right and becomes the script.

Whatever cannot be had ends the cell before the script starts: the reason goes to the status pipe, and there is no way
on. Numbers are those of the kernel's headers.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable, Mapping, Sequence

TYPE_CHECKING = False  # as typing has it, whose import takes longer than all the others here
if TYPE_CHECKING:
    from typing import Any, NoReturn

NOBODY = 65534
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 0x1000, 0x4000, 0x40000, 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 22, 24, 38, 47
MOUNT_SETATTR = 442
RDONLY_NOSUID_NODEV = 1 | 2 | 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOST_FILES = 4096

ARCHITECTURES = {"x86_64": 0, "aarch64": 1}
MACHINE = os.uname().machine
AUDIT = (0xC000003E, 0xC00000B7)
FORBIDDEN: Mapping[str, tuple[int, int]] = {
    "fork": (57, 0xFFFF),
    "vfork": (58, 0xFFFF),
    "clone": (56, 220),
    "clone3": (435, 435),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "io_setup": (206, 0),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
}
"""System calls that the inmate is refused, with their numbers on each architecture: those that make processes, sockets
or memory that no limit counts, and those through which kernels were broken into before."""

libc = ctypes.CDLL(None, use_errno=True)


def call(what: str, result: int) -> int:
    """The result of a C function; an OSError that names the step if it failed."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def wide(value: int) -> ctypes.c_ulong:
    """An argument as wide as a register, which variadic functions read whole."""
    return ctypes.c_ulong(value)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Puts one file system, or a part of the tree there is, at a place."""
    done = libc.mount(source.encode(), target.encode(), kind.encode(), wide(flags), options.encode())
    call(f"mount {kind or source} on {target}", done)


def die_with_parent() -> None:
    """Whatever kills the parent kills this process."""
    call("die with the parent", libc.prctl(PR_SET_PDEATHSIG, wide(signal.SIGKILL), wide(0), wide(0), wide(0)))


def enter_namespaces() -> None:
    """Leaves everything shared behind; the next child is process 1. The identity is mapped from outside, by a helper.

    Root maps two users, so that the inmate is nobody in the world outside too: limits on processes do not bind root.
    """
    mapped = (f"0 0 1\n{NOBODY} {NOBODY} 1", f"0 0 1\n{NOBODY} {NOBODY} 1")
    if os.geteuid() == 0:
        os.setgroups([])
    else:
        mapped = (f"{NOBODY} {os.geteuid()} 1", f"{NOBODY} {os.getegid()} 1")
    ready, asked = os.pipe()
    warden = os.getpid()
    helper = os.fork()
    if helper == 0:
        os.close(asked)
        status = 1
        try:
            if os.read(ready, 1):
                for name, text in (("setgroups", "deny"), ("uid_map", mapped[0]), ("gid_map", mapped[1])):
                    with open(f"/proc/{warden}/{name}", "w") as file:
                        file.write(text)
                status = 0
        finally:
            os._exit(status)
    os.close(ready)
    call("unshare user", libc.unshare(NEWUSER))
    os.write(asked, b"!")
    os.close(asked)
    if os.waitpid(helper, 0)[1] != 0:
        raise OSError(1, f"the user namespace's identity could not be mapped to {mapped[0]!r}")
    call("unshare mount, process, network", libc.unshare(NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS))


def build_root(folder: str, shown: Sequence[tuple[str, str]]) -> None:
    """Makes ``folder`` the root of all: empty but for what is shown, each thing at its place, and read-only.

    The processes live in a folder of that root, not in the root itself: to who is in a chroot the kernel refuses user
    namespaces of their own.
    """
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("cell", folder, "tmpfs", 0, "size=1m,mode=755")
    inside = f"{folder}/root"
    os.umask(0o022)
    for source, place in shown:
        target = inside + place
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(source):
            os.symlink(os.readlink(source), target)
            continue
        if os.path.isdir(source):
            os.makedirs(target, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(source, target, "", MS_BIND | MS_REC)
    attributes = struct.pack("QQQQ", RDONLY_NOSUID_NODEV, 0, 0, 0)
    done = libc.syscall(
        wide(MOUNT_SETATTR), AT_FDCWD, folder.encode(), wide(AT_RECURSIVE), attributes, wide(len(attributes))
    )
    call("mount_setattr read-only", done)
    os.chdir(folder)
    pivot_root = {"x86_64": 155, "aarch64": 41}[MACHINE]
    call("pivot_root", libc.syscall(wide(pivot_root), b".", b"."))
    call("umount the machine's root", libc.umount2(b".", MNT_DETACH))
    os.chdir("/root")
    os.chroot("/root")
    os.chdir("/")


def give_up_rights() -> None:
    """No capability, now or after any exec; nobody's identity."""
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_DROP, wide(capability), wide(0), wide(0), wide(0)) != 0:
            break  # past the last that this kernel knows
    call("clear ambient rights", libc.prctl(PR_CAP_AMBIENT, wide(4), wide(0), wide(0), wide(0)))
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    call("give up capabilities", libc.capset(header, nothing))
    call("no new privileges", libc.prctl(PR_SET_NO_NEW_PRIVS, wide(1), wide(0), wide(0), wide(0)))


def forbid_calls() -> None:
    """A seccomp filter: FORBIDDEN fails with "operation not permitted"; another architecture's calls kill."""
    which = ARCHITECTURES[MACHINE]
    refused = [numbers[which] for numbers in FORBIDDEN.values()]
    load, equal, at_least, ret = 0x20, 0x15, 0x35, 0x06
    lines = [(load, 0, 0, 4), (equal, 1, 0, AUDIT[which]), (ret, 0, 0, 0x80000000), (load, 0, 0, 0)]
    # The numbers of the x32 architecture start there; no others are as high.
    lines.append((at_least, len(refused) + 1, 0, 0x40000000))
    lines += [(equal, len(refused) - i, 0, each) for i, each in enumerate(refused)]
    lines += [(ret, 0, 0, 0x7FFF0000), (ret, 0, 0, 0x00050000 | 1)]
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(text))
    call("seccomp filter", libc.prctl(PR_SET_SECCOMP, wide(2), program, wide(0), wide(0)))


def become_inmate(settings: Mapping[str, Any]) -> NoReturn:
    """The inmate: gives up everything and becomes the script."""
    give_up_rights()
    # After the change of identity, which forgets it.
    die_with_parent()
    for name, limit in settings["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    forbid_calls()
    os.execve(settings["argv"][0], settings["argv"], {})


def keep(settings: Mapping[str, Any]) -> int:
    """The keeper: builds the root, starts the inmate, and gives how it ended as an exit status."""
    die_with_parent()
    build_root(settings["folder"], settings["shown"])
    inmate = fork_to(become_inmate, settings)
    os.closerange(3, MOST_FILES)
    return os.waitstatus_to_exitcode(os.waitpid(inmate, 0)[1]) % 256


def fork_to(part: Callable[[Mapping[str, Any]], int], settings: Mapping[str, Any]) -> int:
    """A child that plays a part and ends with it; what goes wrong goes to the status pipe, which an exec closes."""
    child = os.fork()
    if child == 0:
        status = 97
        try:
            status = part(settings)
        except BaseException as error:
            os.write(settings["status_pipe"], f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(status)
    return child


def guard(settings: Mapping[str, Any]) -> int:
    """The warden: starts the keeper and waits for it; killed politely, it ends the cell first."""
    if MACHINE not in ARCHITECTURES:
        raise OSError(f"system calls are known for {' and '.join(ARCHITECTURES)}, not for {MACHINE}")
    die_with_parent()
    enter_namespaces()
    keeper = fork_to(keep, settings)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(keeper, signal.SIGKILL))
    os.closerange(3, MOST_FILES)
    return os.waitstatus_to_exitcode(os.waitpid(keeper, 0)[1]) % 256


def main() -> int:
    """Plays the warden's part, in this process."""
    settings = json.loads(sys.argv[1])
    for kept in settings["kept"]:
        os.set_inheritable(kept, True)
    os.set_inheritable(settings["status_pipe"], False)
    try:
        return guard(settings)
    except Exception as error:
        os.write(settings["status_pipe"], f"{type(error).__name__}: {error}".encode())
        return 97


if __name__ == "__main__":
    sys.exit(main())
