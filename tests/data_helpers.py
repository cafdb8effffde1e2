"""What tests of data write and read: encoded pictures, tars, and the files of a shard set."""

import io
import tarfile

from flextok_pl.data.shards.tars import tar_samples


def encoded(image, kind="PNG", **options):
    """The file of a picture."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path, files, mode="w"):
    """A tar of contents by name, where a content (type, name) is a link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def contents(index):
    """The files of a shard set by key and extension."""
    return {
        key: {extension: span.read(index.folder) for extension, span in files}
        for path in index.paths
        for key, files in tar_samples(index.folder, path.name)
    }
