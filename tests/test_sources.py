"""Image sets of every kind, and what is wrong with them: the images that there are, each once, under safe names."""

import errno
import io
import multiprocessing
import os
import pickle
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
from PIL import Image

from fastdtd import image_files, images, sources
from fastdtd.errors import InputError, PictureError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 5, 4, 3), np.uint8)


def encoded(pixels, kind="PNG", **how):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **how)
    return content.getvalue()


def write(path, pixels=PIXELS[0]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(pixels, "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG"))
    return path


@pytest.fixture
def folder(tmp_path):
    """Six pictures, of which the first pixel is another in each."""
    for i, name in enumerate(["cat/1.png", "cat/2.png", "dog/1.png", "dog/deep/er/3.png", "eel/4.png", "eel/5.png"]):
        write(tmp_path / "set" / name, PIXELS[i])
    return tmp_path / "set"


def names(*given, **how):
    return [entry.name for entry in sources.find(given, **how)]


def labels(*given, **how):
    return [entry.label for entry in sources.find(given, **how)]


def pixels(entry, **how):
    image = sources.open_image(entry, **how)
    assert image.mode == "RGB"
    return np.asarray(image)


def refused(message, *given, **how):
    with pytest.raises(InputError, match=message) as error:
        sources.find(given, **how)
    assert "\n" not in str(error.value)


# ---- Pictures and folders --------------------------------------------------------------------------------------------


def test_a_folder(folder):
    entries = sources.find([folder])
    assert [entry.name for entry in entries] == [
        "cat/1.png", "cat/2.png", "dog/1.png", "dog/deep/er/3.png", "eel/4.png", "eel/5.png"]
    for entry, expected in zip(entries, PIXELS, strict=True):
        assert entry.path == str(folder / entry.name)
        assert (entry.label, entry.member, entry.size, entry.trouble) == ("", -1, -1, "")
        np.testing.assert_array_equal(pixels(entry), expected)
    assert pickle.loads(pickle.dumps(entries)) == entries


def test_what_is_left_out_of_folders(folder):
    (folder / "notes.txt").write_text("no picture")
    for name in ("._1.png", ".hidden/1.png", "1.png.heatmap.png", "cat/1.png.overlay.png"):
        write(folder / name)
    write(folder / "a.PNG")
    assert names(folder) == ["a.PNG", "cat/1.png", "cat/2.png", "dog/1.png", "dog/deep/er/3.png", "eel/4.png",
                             "eel/5.png"]


def test_files_and_folders_are_in_the_order_of_their_names(tmp_path):
    for name in ("b.png", "b/c.png", "a-.png", "a/z.png", "b/a/x.png", "b/a.png", "c.png"):
        write(tmp_path / name)
    assert names(tmp_path) == ["a/z.png", "a-.png", "b/a/x.png", "b/a.png", "b/c.png", "b.png", "c.png"]


@pytest.mark.parametrize("given", [".", "./", "set", "./set", "../{}/set", "set/../set"])
def test_relative_sources(folder, monkeypatch, given):
    monkeypatch.chdir(folder if given.startswith("./") or given == "." else folder.parent)
    given = {"./set": "../set"}.get(given, given.format(folder.parent.name))
    found = sources.find([given])
    assert [entry.name for entry in found] == names(folder)
    np.testing.assert_array_equal(pixels(found[-1]), PIXELS[5])


def test_each_file_once(folder, tmp_path):
    """In whatever order, and through links."""
    (folder / "dog" / "2.png").symlink_to("1.png")
    (folder / "dog" / "0.png").symlink_to("../eel/4.png")
    (folder / "round").symlink_to(".")  # a link to a folder
    (tmp_path / "link").symlink_to("set")
    (tmp_path / "link.png").symlink_to("set/cat/1.png")
    every = {"cat/1.png", "cat/2.png", "dog/1.png", "dog/deep/er/3.png", "dog/0.png", "eel/5.png"}
    assert set(names(folder)) == every
    assert names(folder, folder, tmp_path / "link", folder / "cat", folder / "cat" / "1.png", tmp_path / "link.png",
                 tmp_path / "link" / "cat" / "2.png", f"{folder}/*/*.png") == names(folder)
    assert set(names(folder / "dog", folder)) == {"0.png", "1.png", "deep/er/3.png", "cat/1.png", "cat/2.png",
                                                  "eel/5.png"}
    assert names(tmp_path / "link.png", folder / "cat") == ["link.png", "2.png"]
    assert names(folder / "cat" / "1.png", tmp_path / "link.png") == ["1.png"]


def test_names_that_are_given_twice(folder):
    assert names(folder / "cat", folder / "dog") == ["1.png", "2.png", "1.png-2", "deep/er/3.png"]
    write(folder / "x" / "1.png-2")
    assert names(folder / "x" / "1.png-2", folder / "cat", folder / "dog") == [
        "1.png-2", "1.png", "2.png", "1.png-3", "deep/er/3.png"]


def test_what_there_is_not(tmp_path):
    refused("no source was given; required: a picture, a folder")
    refused("does not exist; required: a picture, a folder", tmp_path / "none")
    refused("does not exist", "x" * 5000)
    refused("of type NoneType; required", None)
    refused("of type str; required", "a\0b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("a")
    refused("no picture was found in .*empty; files looked for end in .png", tmp_path / "empty")
    write(tmp_path / "full" / "a.png")
    refused("no picture was found in .*empty;", tmp_path / "full", tmp_path / "empty")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize(("name", "shown"), [
    (b"caf\xe9.png", "caf\\udce9.png"), (b"two\nlines.png", "two\\nlines.png"),
    ("größe 大.png".encode(), "größe 大.png"),
    (b"n" * 251 + b".png", "n" * 251 + ".png"), (b"\xff" * 251 + b".png", "\\udcff" * 251 + ".png"),
    (b"[a]*?.png", "[a]*?.png"), (b"{a,b}.png", "{a,b}.png")])
def test_awkward_names(folder, name, shown):
    place = os.path.join(os.fsencode(folder / "cat"), name)
    os.rename(folder / "cat" / "1.png", place)
    assert f"cat/{shown}" in names(folder)
    [entry] = sources.find([os.fsdecode(place)])
    assert entry.name == shown
    np.testing.assert_array_equal(pixels(entry), PIXELS[0])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_what_is_no_file(folder):
    (folder / "a.png").symlink_to("none.png")
    (folder / "b.png").symlink_to("b.png")
    os.mkfifo(folder / "c.png")
    (folder / "d.png").symlink_to("cat")
    found = {entry.name: entry for entry in sources.find([folder, folder / "a.png", folder / "b.png"])}
    assert "d.png" not in found
    assert len(found) == 9
    for name, message in (("a.png", "is a link to what does not exist"), ("b.png", "symbolic link"),
                          ("c.png", "is a named pipe")):
        with pytest.raises(PictureError, match=message):
            sources.open_image(found[name])


def test_a_folder_that_cannot_be_read(folder, monkeypatch):
    """Root may read all: so it is simulated."""
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("cat"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    entries = sources.find([folder], labels=True)
    assert (len(entries), entries[0].name) == (5, "cat")
    assert entries[0].trouble == f"folder {str(folder / 'cat')!r} cannot be read: Permission denied"
    assert sources.find([f"{folder}/**/*.png"])[0].trouble == entries[0].trouble
    [entry] = sources.find([folder / "cat"])
    assert entry.name == "cat"
    with pytest.raises(PictureError, match="Permission denied"):
        sources.open_image(entry)


@pytest.mark.parametrize(("name", "depth"), [("a", 1100), ("abc" * 60, 25)])
def test_deep_folders(tmp_path, monkeypatch, name, depth):
    """Deeper than Python recurses, or than a path may be long."""
    monkeypatch.chdir(tmp_path)
    for _ in range(depth):
        os.mkdir(name)
        os.chdir(name)
    Image.fromarray(PIXELS[1]).save("y.png")
    os.chdir(tmp_path)
    write(tmp_path / "z.png")
    deep, last = sources.find([tmp_path])
    assert last.name == "z.png"
    if depth > 1000:
        np.testing.assert_array_equal(pixels(deep), PIXELS[1])
    else:
        assert deep.trouble.endswith("cannot be read: File name too long")
    assert len(names(f"{tmp_path}/**/*.png")) == 2
    for _ in range(depth):  # rmtree recurses
        os.chdir(name)
    os.unlink("y.png")
    for _ in range(depth):
        os.chdir("..")
        os.rmdir(name)


def test_folders_as_labels(folder):
    assert labels(folder, labels=True) == ["cat", "cat", "dog", "dog", "eel", "eel"]
    assert labels(f"{folder}/*", labels=True) == labels(f"{folder}/**", labels=True) == labels(folder, labels=True)
    assert labels(f"{folder}/[cd]*/*.png", labels=True) == ["cat", "cat", "dog"]
    write(folder / "x.png")
    for given in (folder, folder / "cat", folder / "x.png", f"{folder}/*.png"):
        refused("is in no folder below the source, whose name would be its label; required: pictures as SOURCE/LABEL",
                given, labels=True)


# ---- Globs and braces ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "expected"), [
    ("*/1.png", ["cat/1.png", "dog/1.png"]), ("cat/?.png", ["1.png", "2.png"]), ("*/[!13].png", [
        "cat/2.png", "eel/4.png", "eel/5.png"]), ("**/3.png", ["dog/deep/er/3.png"]), ("dog/**/*.png", [
            "1.png", "deep/er/3.png"]), ("d*/**/**/er/*", ["dog/deep/er/3.png"]), ("{dog,cat}/1.png", [
                "1.png", "1.png-2"]), ("eel/{04..05}.png", None), ("eel/{5..4}.png", ["5.png", "4.png"]),
    ("eel/{4..6}.png", None), ("{cat,e*}/*.png", ["1.png", "2.png", "eel/4.png", "eel/5.png"]), ("*/9.png", None),
    ("c*t", ["cat/1.png", "cat/2.png"]), ("{cat}/1.png", None), ("*/deep/*", ["dog/deep/er/3.png"])])
def test_globs(folder, pattern, expected):
    given = f"{folder}/{pattern}"
    if expected is None:
        refused("does not exist; required|nothing matches", given)
    else:
        assert names(given) == expected


def test_globs_in_this_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert names("*/1.png") == names("./*/1.png") == ["cat/1.png", "dog/1.png"]
    assert names("**") == names(".")


def test_what_globs_match(folder):
    """What has a picture's ending, or that of the glob: not notes, nor what was drawn."""
    (folder / "cat" / "notes.txt").write_text("notes")
    write(folder / "cat" / "1.png.heatmap.png")
    write(folder / "cat" / ".hidden.png")
    (folder / "cat" / "LICENSE").write_text("notes")
    assert names(f"{folder}/cat/*") == ["1.png", "2.png"]
    (folder / "cat" / "a.lst.txt").write_text("2.png\n")
    refused("list .*notes.txt' cannot be used", f"{folder}/cat/*.txt")
    assert names(f"{folder}/cat/*.lst.txt") == ["2.png"]
    (folder / "other").mkdir()
    assert len(names(f"{folder}/*")) == 6
    refused("no picture was found", f"{folder}/oth*")


def test_globs_do_not_go_round(folder):
    (folder / "round").symlink_to(".")
    (folder / "turn").symlink_to(".")
    assert names(f"{folder}/**/1.png") == ["cat/1.png", "dog/1.png"]


# ---- Lists -----------------------------------------------------------------------------------------------------------

LISTS = {
    "paths.txt": "cat/1.png\n\ndog/1.png\n", "labels.txt": "cat/1.png\t3\ndog/1.png\tdog, big", "dos.txt":
    "\ufeffcat/1.png\t3\r\ndog/1.png\tdog, big\r\n", "plain.csv": "cat/1.png,3\ndog/1.png,\"dog, big\"\n", "bom.csv":
    "\ufeffpath,target\r\ncat/1.png,3\r\ndog/1.png,\"dog, big\"\r\n", "order.csv":
    "id,Label,File Name\n0,3,cat/1.png\n1,\"dog, big\",dog/1.png\n\n", "index.csv":
    ",path,class\n0,cat/1.png,3\n1,dog/1.png,\"dog, big\"\n", "semicolons.csv":
    "path;label\ncat/1.png;3\ndog/1.png;dog, big\n", "paths.csv": "cat/1.png\ndog/1.png\n", "path.csv":
    "path\ncat/1.png\ndog/1.png\n", "short.csv": "path,label\ncat/1.png\ndog/1.png,\n"}


@pytest.mark.parametrize("name", LISTS)
def test_lists(folder, name):
    (folder / name).write_bytes(LISTS[name].encode())
    entries = sources.find([folder / name])
    assert [entry.name for entry in entries] == ["cat/1.png", "dog/1.png"]
    assert [entry.label for entry in entries] == (
        ["", ""] if name.startswith(("path", "short")) else ["3", "dog, big"])
    np.testing.assert_array_equal(pixels(entries[1]), PIXELS[2])


def test_paths_in_lists(folder, tmp_path, monkeypatch):
    """Anywhere; but results go below their folder."""
    write(tmp_path / "a b.png", PIXELS[3])
    (folder / "list.txt").write_text(f"../a b.png\n{tmp_path}/a b.png\n{folder}/cat/1.png\n./cat/1.png\ncat/1.png\n")
    inside = str(tmp_path)[1:] + "/a b.png"
    assert names(folder / "list.txt") == ["a b.png", inside, "cat/1.png", "cat/1.png-2", "cat/1.png-3"]
    monkeypatch.chdir(folder)
    entries = sources.find(["list.txt", "list.txt"])
    assert len(entries) == 10
    np.testing.assert_array_equal(pixels(entries[5]), PIXELS[3])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("suffix", [".txt", ".csv"])
def test_names_in_lists_that_are_no_utf_8(folder, suffix):
    os.rename(folder / "cat" / "1.png", os.path.join(os.fsencode(folder), b"caf\xe9.png"))
    (folder / f"list{suffix}").write_bytes(b"caf\xe9.png" + (b"\t" if suffix == ".txt" else b",") + b"\xe9\x1b[1m\n")
    [entry] = sources.find([folder / f"list{suffix}"])
    assert (entry.name, entry.label) == ("caf\\udce9.png", "\\udce9\\x1b[1m")
    np.testing.assert_array_equal(pixels(entry), PIXELS[0])


def test_lists_with_missing_files(folder):
    (folder / "a.csv").write_text("path,label\ncat/1.png,1\nnone.png,2\n,3\n")
    (folder / "b.txt").write_text("cat\t4\n\0\t5\n\t6\n")
    entries = sources.find([folder / "a.csv", folder / "b.txt"])
    assert [entry.label for entry in entries] == list("123456")
    for entry, message in zip(entries[1:], ["none.png' does not exist, which is in line 3 of", "no path is in line 4",
                                            "is a folder", "does not exist", "no path is in line 3"], strict=True):
        with pytest.raises(PictureError, match=message):
            sources.open_image(entry)


@pytest.mark.parametrize(("content", "message"), [
    ("", "it has no line; required: a path a line"), ("\n\n", "it has no line"), ("path,label\n", "it has no line"),
    ("a.png,0\nb.png,1\n", "of the 2 files that it names none exists, such as 'a.png'"),
    ("cat/1.png,0,x\n", "has 3 columns and no header"), ("path,file\ncat/1.png,0\n", "has the columns path, file"),
    ("path,class,label\ncat/1.png,0,0\n", "has the columns path, class, label"), ("id,label\n1,2\n", "has the columns"),
    ("cat/1.png,0\ncat/2.png,1,2\n", "has 3 columns in line 2; required: 2"),
    ("cat/1.png,\"0\n" * 3, "is no CSV from line"), ("cat/1.png,0\n" + "a" * 70_000, "has a line 2 of more than 65536"),
    ("cat/1.png,0\n\"" + "a\n" * 70_000, "is no CSV from line"), (b"\xff\xfea\0", "is in UTF-16; required: UTF-8")])
def test_lists_that_cannot_be_used(folder, content, message):
    (folder / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(message, folder / "a.csv")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".h5", ".tar"])
def test_sources_that_are_no_files(tmp_path, suffix):
    os.mkfifo(tmp_path / f"a{suffix}")
    refused("named pipe; required: a regular file", tmp_path / f"a{suffix}")
    (tmp_path / f"b{suffix}").symlink_to("none")
    refused("No such file", tmp_path / f"b{suffix}")


# ---- Tars ------------------------------------------------------------------------------------------------------------


def member(name, content=b"", kind=tarfile.REGTYPE, **how):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for key, value in how.items():
        setattr(info, key, value)
    return info, content


def tar(path, *members, form=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=form) as file:
        for info, content in members:
            file.addfile(info, io.BytesIO(content))
    return path


PNGS = [encoded(one) for one in PIXELS]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars(tmp_path, form):
    long = "f/" * 45 + "n" * 90 + ".png"
    place = tar(tmp_path / "shard-0.tar", member("train", kind=tarfile.DIRTYPE), member("train/0.png", PNGS[0]),
                member("train/0.cls", b" 7\n"), member("train/1.cls", b"cat"), member("train/1.jpg.png", PNGS[1]),
                member("train/1.json", b"{}"), member(long, PNGS[2]), member("größe.png", PNGS[3]),
                member("a.left.png", PNGS[4]), member("a.cls", b"1"), member("._a.png", b"no"),
                member(".x/a.png", b"no"), member("0.png.heatmap.png", b"no"), form=form)
    entries = sources.find([place])
    assert [entry.name for entry in entries] == [
        f"shard-0/{name}" for name in ("train/0.png", "train/1.jpg.png", long, "größe.png", "a.left.png")]
    assert [entry.label for entry in entries] == ["7", "cat", "", "", "1"]
    for entry, expected in zip(entries, PIXELS[:5], strict=True):
        assert entry.path == str(place)
        np.testing.assert_array_equal(pixels(entry), expected)


def test_shards(tmp_path):
    for i in range(12):
        tar(tmp_path / f"s-{i:03}.tar", member("0.png", PNGS[i % 6]), member("0.cls", b"%d" % i))
    expected = [str(i) for i in range(12)]
    assert labels(f"{tmp_path}/s-{{000..011}}.tar") == labels(f"{tmp_path}/*.tar") == expected
    assert labels(f"{tmp_path}/*.tar", f"{tmp_path}/s-001.tar") == expected
    assert labels(f"{tmp_path}/s-{{010..009}}.tar") == ["10", "9"]
    assert names(f"{tmp_path}/s-{{000,011}}.tar") == ["s-000/0.png", "s-011/0.png"]
    refused(r"s-012.tar', of .*s-\{010..999\}.tar', does not exist", f"{tmp_path}/s-{{010..999}}.tar")
    entries = sources.find([f"{tmp_path}/*.tar"])  # more than are kept open
    for _ in range(2):
        for i, entry in enumerate(entries):
            np.testing.assert_array_equal(pixels(entry), PIXELS[i % 6])


def test_names_in_tars_lead_nowhere(tmp_path):
    place = tar(tmp_path / "a.tar", *(member(name, PNGS[0]) for name in (
        "/etc/a.png", "../../a.png", "./b.png", "x/../../c.png", "d\x1b[1m.png", "b.png", "b.png")))
    assert names(place) == ["a/etc/a.png", "a/a.png", "a/b.png", "a/x/c.png", "a/d\\x1b[1m.png", "a/b.png-2",
                            "a/b.png-3"]
    assert not any(name.startswith("/") or ".." in name.split("/") for name in names(place))


@pytest.mark.parametrize(("kind", "message"), [
    (tarfile.SYMTYPE, "is a link in the tar"), (tarfile.LNKTYPE, "is a link"), (tarfile.CHRTYPE, "is a device"),
    (tarfile.FIFOTYPE, "is a named pipe"), (b"Z", "is of an unknown kind"), (tarfile.GNUTYPE_SPARSE, "is sparse")])
def test_other_members(tmp_path, kind, message):
    tar(tmp_path / "a.tar", member("a.png", kind=kind, linkname="/etc/passwd"), member("b.png", PNGS[1]))
    bad, good = sources.find([tmp_path / "a.tar"])
    np.testing.assert_array_equal(pixels(good), PIXELS[1])
    with pytest.raises(PictureError, match=f"picture 'a.png' in .*{message}.*; required: a regular member"):
        sources.open_image(bad)


def test_sparse_members(tmp_path):
    """GNU's, with more than one header; and POSIX's."""
    first, second = member("a.png", bytes(1024))[0], member("b.png", PNGS[1])
    first.type = tarfile.GNUTYPE_SPARSE
    head = bytearray(first.tobuf(tarfile.GNU_FORMAT))
    head[482] = 1
    head[148:156] = b"%06o\0 " % (sum(head) - sum(head[148:156]) + 256)
    extension = bytearray(512)
    extension[504] = 1
    rest = tar(tmp_path / "rest.tar", second).read_bytes()
    (tmp_path / "a.tar").write_bytes(bytes(head) + bytes(extension) + bytes(512) + bytes(1024) + rest)
    bad, good = sources.find([tmp_path / "a.tar"])
    assert "is sparse in the tar" in bad.trouble
    np.testing.assert_array_equal(pixels(good), PIXELS[1])
    tar(tmp_path / "b.tar", member("a.png", PNGS[0], pax_headers={"GNU.sparse.major": "1"}), second,
        form=tarfile.PAX_FORMAT)
    bad, good = sources.find([tmp_path / "b.tar"])
    assert "is sparse in the tar" in bad.trouble


@pytest.mark.parametrize("end", [0, 100, 511, 512, 700, 1023])
def test_tars_that_are_cut_off(tmp_path, end):
    """At every place in the third member: the two before are there."""
    content = tar(tmp_path / "a.tar", *(member(f"{i}.png", PNGS[i]) for i in range(4))).read_bytes()
    start = sources.find([tmp_path / "a.tar"])[2].member - 512
    (tmp_path / "a.tar").write_bytes(content[:start + min(end, 512 + len(PNGS[2]) - 1)])
    *good, rest = sources.find([tmp_path / "a.tar"])
    assert [entry.name for entry in good] == ["a/0.png", "a/1.png"]
    np.testing.assert_array_equal(pixels(good[1]), PIXELS[1])
    with pytest.raises(PictureError, match=r"tar .* (ends at byte|has \d+ bytes from|says that member).*cut off"):
        sources.open_image(rest)


def header(name, size, kind=tarfile.REGTYPE):
    """Of a member, with a size as it is written."""
    head = bytearray(member(name, kind=kind)[0].tobuf(tarfile.GNU_FORMAT))
    head[124:136] = size.ljust(12, b"\0")
    head[148:156] = b"%06o\0 " % (sum(head) - sum(head[148:156]) + 256)
    return bytes(head)


@pytest.mark.parametrize(("rest", "message"), [
    (b"x" * 512, "has no sound header"), (header("b.png", b"\xff" * 12), "has -1 bytes"),
    (header("b.png", b"\x80" + b"\xff" * 11), r"has \d+ bytes from"), (header("b.png", b"77777777777\0"), "bytes from"),
    (header("b.png", b"-0000000005\0"), "has -5 bytes"), (header("b.png", b"zzz".ljust(12)), "has -1 bytes"),
    (header("x", b"77777777777\0", tarfile.XHDTYPE), "bytes of names or attributes before"),
    (header("x", b"77777777777\0", tarfile.GNUTYPE_LONGNAME), "bytes of names or attributes before"),
    (header("x", b"%011o\0" % 2**17, tarfile.XGLTYPE), "131072 bytes of names or attributes"),
    (header("x", b"%011o\0" % 20, tarfile.XHDTYPE) + b"99999 path=a.png\n".ljust(512, b"\0") + header("y", b"0"),
     "ends at byte"),
    (header("x", b"%011o\0" % 20, tarfile.XHDTYPE) + b"nonsense".ljust(512, b"\0"), "attributes that is damaged"),
    (header("x", b"%011o\0" % 20, tarfile.XHDTYPE) + b"0 size=1\n".ljust(512, b"\0"), "attributes that is damaged"),
    (header("x", b"%011o\0" % 13, tarfile.XHDTYPE) + b"13 size=-512\n".ljust(512, b"\0") + header("b.png", b"0"),
     "has -1 bytes"),
    (b"".join(header("x", b"%011o\0" % 0, tarfile.XHDTYPE) for _ in range(3000)), "cut off"),
    (b"\0" * 1024 + header("b.png", b"0"), "has more after its end"),
])
def test_tars_that_are_damaged(tmp_path, rest, message):
    content = tar(tmp_path / "a.tar", member("a.png", PNGS[0])).read_bytes()
    end = 512 + -(-len(PNGS[0]) // 512) * 512
    (tmp_path / "a.tar").write_bytes(content[:end] + rest)
    good, bad = sources.find([tmp_path / "a.tar"])
    np.testing.assert_array_equal(pixels(good), PIXELS[0])
    with pytest.raises(PictureError, match=message):
        sources.open_image(bad)
    (tmp_path / "b.tar").write_bytes(rest)
    refused(f"{message}.*required: a tar of pictures|has no picture", tmp_path / "b.tar")


def test_large_members(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "_MAX_BYTES", len(PNGS[0]) - 1)
    [entry] = sources.find([tar(tmp_path / "a.tar", member("a.png", PNGS[0]))])
    assert f"has {len(PNGS[0])} bytes; at most" in entry.trouble


def test_tars_that_are_none(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    refused("ends at byte 0 without a tar's end", tmp_path / "a.tar")
    tar(tmp_path / "b.tar", member("a.txt", b"a"))
    refused("tar .* has no picture; required", tmp_path / "b.tar")
    tar(tmp_path / "c.any", member("a.png", PNGS[0]))
    assert names(tmp_path / "c.any") == ["c/a.png"]


@pytest.mark.parametrize(("how", "name"), [("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")])
def test_compressed_tars(tmp_path, how, name):
    for path in (tmp_path / f"a.tar.{how}", tmp_path / "a.tar"):
        with tarfile.open(path, f"w:{how}"):
            pass
        refused(rf"is compressed \({name}\).*required: unpack it first", path)


def test_a_tar_that_shrinks_or_changes(tmp_path):
    place = tar(tmp_path / "a.tar", member("0.png", PNGS[0]), member("1.png", PNGS[1]))
    entries = sources.find([place])
    tar(place, member("0.png", PNGS[2]))
    np.testing.assert_array_equal(pixels(entries[0]), PIXELS[2])  # of what is there now
    with pytest.raises(PictureError, match=r"picture 'a/1.png' in .*is damaged"):
        sources.open_image(entries[1])
    place.write_bytes(place.read_bytes()[:600])
    with pytest.raises(PictureError, match=r"has \d+ bytes of which \d+ are left: the tar was cut off"):
        sources.open_image(entries[0])
    place.unlink()
    with pytest.raises(PictureError, match="cannot be read: No such file"):
        sources.open_image(entries[0])


# ---- HDF5 ------------------------------------------------------------------------------------------------------------


def hdf5(path, libver="earliest", **datasets):
    with h5py.File(path, "w", libver=libver) as file:
        for name, value in datasets.items():
            data, how = value if isinstance(value, tuple) else (value, {})
            file.create_dataset(name.replace("__", "/"), data=data, **how)
    return path


STORED = {"contiguous": {}, "one a chunk": {"chunks": (1, 5, 4, 3)}, "parts of many": {"chunks": (4, 2, 3, 2)},
          "gzip": {"chunks": (4, 5, 4, 3), "compression": "gzip", "shuffle": True, "fletcher32": True},
          "lzf": {"chunks": (1, 5, 4, 3), "compression": "lzf"}, "one": {"chunks": (6, 5, 4, 3)}}


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("how", STORED.values(), ids=STORED.keys())
def test_hdf5_files(tmp_path, how, libver):
    place = hdf5(tmp_path / "a.h5", libver, images=(PIXELS, how), labels=np.arange(6) * 3, scores=np.zeros((6, 9)))
    for source in (place, f"{place}:/images", f"{tmp_path}/*.h5", f"{tmp_path}/*.h5:/images"):
        entries = sources.find([source])
        assert [entry.name for entry in entries] == [f"a/{i}" for i in range(6)]
        assert [entry.label for entry in entries] == ["0", "3", "6", "9", "12", "15"]
    for i in (3, 0, 5, 1, 2, 4, 3):
        np.testing.assert_array_equal(pixels(entries[i]), PIXELS[i])


@pytest.mark.parametrize(("shape", "move"), [
    ((6, 5, 4), lambda one: one[..., None].repeat(3, 2)), ((6, 5, 4, 1), lambda one: one.repeat(3, 2)),
    ((6, 5, 4, 3), lambda one: one), ((6, 1, 5, 7), lambda one: one.transpose(1, 2, 0).repeat(3, 2)),
    ((6, 3, 5, 4), None), ((6, 3, 5, 7), lambda one: one.transpose(1, 2, 0)), ((6, 5, 4, 4), None)])
@pytest.mark.parametrize("chunks", [None, True])
def test_layouts_of_images(tmp_path, shape, move, chunks):
    data = RNG.integers(0, 256, shape, np.uint8)
    if shape == (6, 5, 4, 4):
        data[..., 3] = 255
    place = hdf5(tmp_path / "a.h5", x=(data, {"chunks": chunks}))
    if shape == (6, 3, 5, 4):
        refused("/x has shape .* whose channels may be first or last", place)
        return
    for entry, one in zip(sources.find([place]), data, strict=True):
        np.testing.assert_array_equal(pixels(entry), move(one) if move else one[..., :3])


@pytest.mark.parametrize("texts", [["a", "größe", "b\x1b", "", "a", "c"], np.array([b"a", b"bc"] * 3)])
def test_labels_that_are_names(tmp_path, texts):
    place = hdf5(tmp_path / "a.h5", set__x=PIXELS, set__label=texts, labels=np.arange(4))
    expected = [one.decode() if isinstance(one, bytes) else one.replace("\x1b", "\\x1b") for one in list(texts)]
    assert labels(place) == expected


@pytest.mark.parametrize(("datasets", "message"), [
    ({"x": PIXELS, "y__z": PIXELS}, "has the datasets of images /x, /y/z; required: which one, as FILE:/DATASET"),
    ({"x": PIXELS.astype("f4")}, r"has no dataset of images.*its datasets: /x, Float \(6, 5, 4, 3\)"),
    ({"x": PIXELS.astype("i1")}, "has no dataset of images"), ({"x": PIXELS[0, 0]}, "has no dataset of images"),
    ({"x": np.zeros((0, 5, 4, 3), np.uint8)}, "has no dataset of images"), ({}, "its datasets: none"),
    ({"x": PIXELS, "label": np.arange(5)}, r"/label has shape \(5,\); required: \(6,\)"),
    ({"x": PIXELS, "label": np.arange(6), "labels": np.arange(6)}, "has both /label and /labels"),
    ({"x": PIXELS, "label": np.arange(6.0)}, "/label is of HDF5 type Float; required: integers or strings"),
    ({"x": PIXELS, "label": np.eye(6)}, "/label has shape"),
    ({"x": (PIXELS, {"chunks": (4, 5, 4, 3), "scaleoffset": 0})}, "is stored with the HDF5 filters"),
    ({"x": (PIXELS, {"chunks": (4, 5, 4, 3), "maxshape": (None, 5, 4, 3)})}, None)])
def test_hdf5_files_that_cannot_be_used(tmp_path, datasets, message):
    place = hdf5(tmp_path / "a.h5", **datasets)
    if message is None:
        assert len(names(place)) == 6
    else:
        refused(f"HDF5 file .*{message}", place)


def test_datasets_by_name(tmp_path):
    place = hdf5(tmp_path / "a.h5", x=PIXELS, y__z=PIXELS[::-1], label=np.arange(6))
    assert labels(f"{place}:/x") == [str(i) for i in range(6)]
    assert labels(f"{place}:/y/z") == [""] * 6
    np.testing.assert_array_equal(pixels(sources.find([f"{place}:/y/z"])[0]), PIXELS[5])
    assert names(f"{place}:/x", f"{place}:/y/z", f"{place}:/x")[::6] == ["a/0", "a/0-2"]
    refused(r"has no dataset '/none'; its datasets: /label, .*; /x, Integer \(6, 5, 4, 3\); /y/z", f"{place}:/none")
    refused("has no dataset '/y'", f"{place}:/y")
    refused("does not exist", f"{tmp_path}/none.h5:/x")
    write(tmp_path / "a.png")
    refused("does not exist", f"{tmp_path}/a.png:/x")


def test_links_in_hdf5_files(tmp_path):
    place = hdf5(tmp_path / "a.h5", x=PIXELS)
    hdf5(tmp_path / "other.h5", y=PIXELS)
    with h5py.File(place, "r+") as file:
        file["again"], file["soft"], file["round"] = file["x"], h5py.SoftLink("/x"), file["/"]
        file["out"] = h5py.ExternalLink("other.h5", "/y")
    assert len(names(place)) == 6
    refused("has no dataset '/out'", f"{place}:/out")


def test_images_that_were_not_written(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (6, 5, 4, 3), np.uint8, chunks=(1, 5, 4, 3), compression="gzip")[3] = PIXELS[3]
        file["x"].id.write_direct_chunk((4, 0, 0, 0), b"no gzip")
    entries = sources.find([tmp_path / "a.h5"])
    np.testing.assert_array_equal(pixels(entries[3]), PIXELS[3])
    for row, message in (0, "row 0 of '/x' in .* was not written"), (4, "row 4 of .* zlib cannot inflate"):
        with pytest.raises(PictureError, match=message):
            sources.open_image(entries[row])


def test_hdf5_files_that_are_damaged(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"no HDF5")
    refused("HDF5 file .* is not an HDF5 file", tmp_path / "a.h5")
    place = hdf5(tmp_path / "b.h5", x=PIXELS)
    content = place.read_bytes()
    place.write_bytes(content[:-40])
    refused("it is cut off", place)
    place.write_bytes(content.replace(PIXELS.nbytes.to_bytes(8, "little"), (PIXELS.nbytes - 1).to_bytes(8, "little")))
    refused("claims 360 bytes but|of which 359 are stored", place)
    renamed = hdf5(tmp_path / "c.any", x=PIXELS)
    entries = sources.find([renamed])
    hdf5(renamed, x=PIXELS[:2])
    np.testing.assert_array_equal(pixels(entries[1]), PIXELS[1])
    with pytest.raises(PictureError, match="has 2 rows; row 2 is to be read"):
        sources.open_image(entries[2])
    with open(renamed, "r+b") as file:
        file.truncate(2100)
    with pytest.raises(PictureError, match=r"row 1 of '/x' in .* it is cut off|ends after"):
        sources.open_image(entries[1])


def test_chunks_of_too_many_rows(tmp_path, monkeypatch):
    place = hdf5(tmp_path / "a.h5", x=(PIXELS, STORED["gzip"]))
    monkeypatch.setattr(image_files.hdf5_storage, "MAX_SLAB_BYTES", 200)
    refused("has chunks of 4 rows, which take 240 bytes; at most 200 are accepted", place)


def test_no_memory_left(tmp_path, monkeypatch):
    def read(file, start, count):
        raise MemoryError

    given = hdf5(tmp_path / "a.h5", x=PIXELS), tar(tmp_path / "a.tar", member("a.png", PNGS[0]))
    entries = sources.find(given)
    monkeypatch.setattr(image_files.OpenFile, "read", read)
    for entry in entries:
        with pytest.raises(PictureError, match=r"(row|picture) .* in .* does not fit into memory"):
            sources.open_image(entry)


def test_rows_are_read_without_the_rest(tmp_path, monkeypatch):
    """A row takes its own bytes, or those of its chunks, once."""
    read = []
    one = image_files.OpenFile.read
    monkeypatch.setattr(image_files.OpenFile, "read", lambda file, start, count: read.append(count) or one(
        file, start, count))
    for how, expected in (("contiguous", [60] * 4), ("one a chunk", [60] * 4), ("one", [360])):
        entries = sources.find([hdf5(tmp_path / f"{how}.h5", x=(PIXELS, STORED[how]))])
        read.clear()
        for i in (2, 3, 4, 2):
            pixels(entries[i])
        assert read == expected


# ---- Many at once ----------------------------------------------------------------------------------------------------


@pytest.fixture
def everything(folder, tmp_path):
    for how, options in STORED.items():
        hdf5(tmp_path / f"{how}.h5", x=(PIXELS, options))
    for i in range(10):
        tar(tmp_path / f"{i}.tar", *(member(f"{n}.png", PNGS[n]) for n in range(6)))
    return sources.find([folder, f"{tmp_path}/*.tar", f"{tmp_path}/*.h5"])


def read_all(entries, seed=0):
    for i in np.random.default_rng(seed).permutation(len(entries)):
        np.testing.assert_array_equal(pixels(entries[i]), PIXELS[i % 6])


def test_by_many_threads(everything):
    assert len(everything) == 6 * (1 + 10 + len(STORED))
    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(read_all, everything, seed) for seed in range(16)]:
            done.result()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked")
def test_a_fork_while_others_read(everything):
    stop = threading.Event()

    def read():
        while not stop.is_set():
            read_all(everything)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(8):
            child = multiprocessing.get_context("fork").Process(target=read_all, args=(everything,))
            child.start()
            child.join(30)
            child.kill()
            assert child.exitcode == 0
    finally:
        stop.set()
        for reader in readers:
            reader.join()


@pytest.mark.skipif(not hasattr(os, "pread"), reason="it is always so")
def test_systems_without_pread(everything, monkeypatch):
    monkeypatch.delattr(os, "pread")
    test_by_many_threads(everything)


def test_files_are_closed(everything):
    read_all(everything)
    assert image_files._kept.files.cache_info().currsize <= 8
    place = f"/proc/{os.getpid()}/fd"
    if os.path.isdir(place):
        open_now = [os.path.realpath(os.path.join(place, one)) for one in os.listdir(place)]
        assert sum(one.endswith((".tar", ".h5")) for one in open_now) <= 12


# ---- Scaled while decoding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "draft", "expected"), [
    ((400, 300), (75, 100), (75, 100)), ((400, 300), (76, 100), (150, 200)), ((400, 300), (1, 1), (38, 50)),
    ((400, 300), (224, 224), (300, 400)), ((401, 301), (150, 200), (151, 201)), ((400, 300), (500, 9), (300, 400))])
@pytest.mark.parametrize("orientation", [1, 6])
def test_jpegs_are_scaled_while_they_are_decoded(tmp_path, size, draft, expected, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    turned = image.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else image
    content = io.BytesIO()
    turned.save(content, "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(content.getvalue())
    tar(tmp_path / "a.tar", member("a.jpg", content.getvalue()))
    for source in ("a.jpg", "a.tar"):
        [entry] = sources.find([tmp_path / source])
        assert pixels(entry).shape[:2] == size[::-1]
        scaled = pixels(entry, draft=draft)
        assert scaled.shape[:2] == expected
        wanted = np.asarray(image.resize(expected[::-1], Image.Resampling.BOX))
        assert np.abs(scaled - wanted.astype(int)).mean() < 3


def test_other_formats_are_not(tmp_path):
    write(tmp_path / "a.png", np.zeros((40, 40, 3), np.uint8))
    hdf5(tmp_path / "a.h5", x=np.zeros((1, 40, 40, 3), np.uint8))
    for source in ("a.png", "a.h5"):
        assert pixels(*sources.find([tmp_path / source]), draft=(5, 5)).shape == (40, 40, 3)
    with pytest.raises(PictureError, match="is damaged"):
        images.open_bytes(b"", "the name", (5, 5))
