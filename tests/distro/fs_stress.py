"""Runs in the guest: changes files at random for some seconds, and knows what must be in each.

    fs_stress.py FOLDER SECONDS SEED    work, then write down what must be there
    fs_stress.py FOLDER check           compare

Several processes work at once, each in a folder of its own, as fsstress does it.
"""

import hashlib
import json
import os
import random
import sys
import time

PROCESSES = 4
MOST_FILES = 40
MOST_BYTES = 1 << 18


def digest(path):
    with open(path, "rb") as file:
        return hashlib.md5(file.read()).hexdigest()


def work(folder, seconds, seed):
    os.makedirs(folder, exist_ok=True)
    chance = random.Random(seed)
    files = {}
    made = steps = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        steps += 1
        name = chance.choice(list(files)) if files else None
        kind = chance.random()
        if name is None or (kind < 0.35 and len(files) < MOST_FILES):
            made += 1
            sub = os.path.join(folder, f"d{made % 5}")
            os.makedirs(sub, exist_ok=True)
            name = os.path.join(sub, f"f{made}")
            files[name] = bytearray()
            open(name, "wb").close()
        path, data = name, files[name]
        if kind < 0.6:  # write somewhere, perhaps beyond the end
            at = chance.randrange(MOST_BYTES)
            piece = chance.randbytes(chance.randrange(1, 1 << 15))
            direct = chance.random() < 0.2
            with open(path, "r+b", buffering=0) as file:
                os.pwrite(file.fileno(), piece, at)
                if direct:
                    os.fdatasync(file.fileno())
            if len(data) < at:
                data.extend(bytes(at - len(data)))
            data[at : at + len(piece)] = piece
        elif kind < 0.7:
            size = chance.randrange(MOST_BYTES)
            os.truncate(path, size)
            del data[size:]
            data.extend(bytes(size - len(data)))
        elif kind < 0.8:
            made += 1
            target = os.path.join(folder, f"r{made}")
            os.rename(path, target)
            files[target] = files.pop(path)
        elif kind < 0.9:
            os.unlink(path)
            del files[path]
        elif kind < 0.95:
            with open(path, "rb") as file:
                assert file.read() == data, path
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    expected = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
    with open(folder + ".json", "w") as file:
        json.dump(expected, file)
    print(folder, steps, "steps", len(files), "files")


def check(folder):
    with open(folder + ".json") as file:
        expected = json.load(file)
    there = {os.path.join(at, name) for at, _folders, names in os.walk(folder) for name in names}
    assert there == set(expected), there ^ set(expected)
    for name, wanted in expected.items():
        assert digest(name) == wanted, name


def main():
    base = sys.argv[1]
    folders = [os.path.join(base, f"p{number}") for number in range(PROCESSES)]
    children = []
    for number, folder in enumerate(folders):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        try:
            if sys.argv[2] == "check":
                check(folder)
            else:
                work(folder, float(sys.argv[2]), f"{sys.argv[3]} {number}")
            status = 0
        except BaseException as error:
            print(folder, repr(error), flush=True)
        sys.stdout.flush()
        os._exit(status)
    sys.exit(any(os.waitpid(child, 0)[1] for child in children))


main()
