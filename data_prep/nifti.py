"""NIfTI files: a gate in front of nibabel, and writing that gives the same bytes for the same content.

nibabel believes a header: 286 KB may claim 16 GB, a negative dimension yields a shape. `open_nifti` checks every claim
against the file before memory is asked for.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np

from data_prep.errors import ImageReadError
from data_prep.geometry import Grid, check_affine, max_distance_mm
from data_prep.model import Form

#: deflate cannot compress more than this
MAX_GZIP_RATIO = 1032
#: one volume may not claim more than this in memory
MAX_BYTES = 16 << 30
_CHUNK = 1 << 20
#: cosine of the angle between two axes from which ITK refuses a file
MAX_COSINE = 1e-4
#: qform and sform may differ by this, plus, per mm of extent, what a quaternion in single precision loses: its first
#: component is recomputed as a root of a difference, which costs up to sqrt(2 * 2**-24) = 3.5e-4 rad near a half turn
FORM_TOLERANCE_MM = 0.01
FORM_TOLERANCE_RAD = 6e-4


@dataclass(frozen=True)
class NiftiFile:
    """A checked header with its image, whose data have not been read yet."""

    path: Path
    image: nib.Nifti1Image
    grid: Grid
    num_channels: int
    is_gzip: bool
    num_bytes: int
    """Length of the unpacked file that the header announces: voxels and what stands before them."""

    def read(self, channel: int | None = None) -> np.ndarray:
        """Voxels ``(i, j, k)`` with the header's scaling applied; integer types stay when there is no scaling.

        Raises:
            ImageReadError: the stream is damaged or too short.
        """
        try:
            data = (
                np.asanyarray(self.image.dataobj)
                if channel is None
                else np.asanyarray(self.image.dataobj[..., channel])
            )
        except (OSError, EOFError, zlib.error, ValueError, MemoryError, OverflowError) as error:
            raise ImageReadError("damaged-data", "the voxels cannot be read to their end") from error
        return data.reshape(self.grid.shape)


def open_nifti(path: os.PathLike[str] | str, form: Form = "strict") -> NiftiFile:
    """Open a NIfTI file after checking its header against the file.

    Args:
        path: ``.nii`` or ``.nii.gz``; the content decides, not the name.
        form: ``"strict"`` refuses files whose qform and sform disagree or which have neither; ``"sform"`` and
            ``"qform"`` take that one; ``"spacing"`` takes voxel sizes alone when neither is set.

    Raises:
        ImageReadError: damaged, too large for its size, impossible dimensions or affine.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(2)
            is_gzip = head == b"\x1f\x8b"
            file.seek(0)
            raw = _read_head(file, is_gzip, 540)
    except (OSError, EOFError, zlib.error) as error:
        raise ImageReadError("damaged-data", "the header cannot be read") from error
    if len(raw) < 348:
        raise ImageReadError("damaged-data", f"{len(raw)} bytes of header, a NIfTI header has at least 348")
    is_version_2 = raw[4:8] == b"n+2\0"
    if not is_version_2 and raw[344:348] != b"n+1\0":
        raise ImageReadError("not-nifti", "the magic number of a single-file NIfTI image is missing")
    header_class = nib.Nifti2Header if is_version_2 else nib.Nifti1Header
    image_class = nib.Nifti2Image if is_version_2 else nib.Nifti1Image
    try:
        header = header_class(raw[: 540 if is_version_2 else 348], check=False)
        dims = [int(n) for n in header["dim"]]
        itemsize = header.get_data_dtype().itemsize
        offset = float(header["vox_offset"])
        slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    except Exception as error:  # nibabel raises many classes for a damaged header
        raise ImageReadError("damaged-header", "the header cannot be understood") from error
    num_dims = dims[0]
    if not 2 <= num_dims <= 5 or any(n <= 0 for n in dims[1 : num_dims + 1]):
        raise ImageReadError("impossible-dimensions", f"dim = {dims}")
    shape = [*dims[1 : num_dims + 1], 1, 1, 1][:5]
    if shape[3] > 1 and shape[4] > 1:
        raise ImageReadError("too-many-dimensions", f"dim = {dims}; three axes and one of channels are understood")
    claimed = itemsize
    for n in shape:
        claimed *= n
    if itemsize == 0 or claimed > MAX_BYTES:
        raise ImageReadError("too-large", f"the header claims {claimed} bytes, the limit is {MAX_BYTES}")
    if not (np.isfinite(offset) and (540 if is_version_2 else 348) <= offset <= 1 << 26 and offset == int(offset)):
        raise ImageReadError("damaged-header", "the offset of the voxels lies inside the header or is not a number")
    available = size * MAX_GZIP_RATIO if is_gzip else size
    if claimed + offset > available:
        raise ImageReadError("too-large", f"the header claims {claimed} bytes of voxels, the file has {size} bytes")
    if not (np.isnan(slope) or (np.isfinite(slope) and (slope == 0 or np.isfinite(inter)))):
        raise ImageReadError("damaged-header", "scl_slope or scl_inter is not finite")
    if np.isfinite(slope) and slope != 0 and abs(slope) * 2.0 ** min(8 * itemsize, 64) + abs(inter) > 3e38:
        raise ImageReadError("damaged-header", "scl_slope makes the intensities overflow")
    try:
        image = image_class.from_filename(str(path))
        affine = _affine(image.header, form)
    except ImageReadError:
        raise
    except Exception as error:
        raise ImageReadError("damaged-header", "the header cannot be understood") from error
    if int(header["xyzt_units"]) & 7 not in (0, 2):
        raise ImageReadError("not-millimeters", "the header's unit is not mm, which ITK converts and nibabel ignores")
    if header.get_data_dtype().kind not in "iuf":
        raise ImageReadError("unsupported-type", "complex, colored or bit-packed voxels are not images or labels")
    problem = check_affine(affine) or _check_right_angles(affine)
    if problem:
        raise ImageReadError("impossible-affine", problem)
    return NiftiFile(path, image, Grid(tuple(shape[:3]), affine), shape[3] * shape[4], is_gzip, claimed + int(offset))


def _affine(header: nib.Nifti1Header, form: Form) -> np.ndarray:
    qcode, scode = int(header["qform_code"]), int(header["sform_code"])
    if (form == "sform" and scode > 0) or (scode > 0 and qcode <= 0):
        return header.get_sform().astype(np.float64)
    if (form == "qform" and qcode > 0) or (qcode > 0 and scode <= 0):
        return header.get_qform().astype(np.float64)
    if qcode > 0 and scode > 0:
        sform, qform = header.get_sform().astype(np.float64), header.get_qform().astype(np.float64)
        shape = tuple(int(n) for n in header["dim"][1:4])
        distance = max_distance_mm(shape, sform, qform)
        extent = float(np.linalg.norm(sform[:3, :3] @ (np.array(shape) - 1)))
        if not distance <= FORM_TOLERANCE_MM + FORM_TOLERANCE_RAD * extent:
            raise ImageReadError(
                "qform-sform-disagree", f"voxels lie up to {distance:.3g} mm apart; choose with --form sform or qform"
            )
        return sform
    if form == "spacing":
        return header.get_base_affine().astype(np.float64)
    raise ImageReadError("no-orientation", "neither qform nor sform is set; accept voxel sizes with --form spacing")


def _check_right_angles(affine: np.ndarray) -> str:
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(directions.T @ directions - np.eye(3)).max() > MAX_COSINE:
        return "the axes are not at right angles (a sheared grid), which ITK, and with it nnU-Net, does not read"
    return ""


def _read_head(file: BinaryIO, is_gzip: bool, count: int) -> bytes:
    if not is_gzip:
        return file.read(count)
    return zlib.decompressobj(31).decompress(file.read(1 << 16), count)


def verify_stream(nifti: NiftiFile) -> str:
    """Read the file to its end without keeping it: length, checksum, nothing behind the voxels.

    Returns:
        SHA-256 of shape, type and stored voxels, whatever the rest of the header and the compression are.

    Raises:
        ImageReadError: truncated, damaged, or longer than the header says.
    """
    expected = nifti.num_bytes
    proxy: Any = nifti.image.dataobj
    count, offset = 0, int(proxy.offset)
    digest = hashlib.sha256(f"{nifti.grid.shape} {nifti.image.get_data_dtype()}".encode())
    try:
        with gzip.open(nifti.path, "rb") if nifti.is_gzip else open(nifti.path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk[max(0, offset - count) :])
                count += len(chunk)
                if count > expected + _CHUNK:
                    raise ImageReadError("damaged-data", f"more than the {expected} bytes the header announces")
    except (OSError, EOFError, zlib.error) as error:
        raise ImageReadError("damaged-data", f"the stream breaks off after {count} of {expected} bytes") from error
    if count < expected:
        raise ImageReadError("damaged-data", f"{count} bytes where the header announces {expected}")
    return digest.hexdigest()


def _packer(data: np.ndarray) -> Any:
    """A gzip stream without name and time, as strong as pays for such data.

    Label maps repeat and are worth a search. The noise of images does not: on MR, whose background of zeros makes runs
    of equal bytes, looking for runs alone takes a tenth of the time of level 6 for files 8 to 12 % larger; on CT, whose
    air makes none, level 1 takes a fifth for 3 to 5 % (figures of benchmarks/data_prep.py).
    """
    level, strategy = 1, zlib.Z_DEFAULT_STRATEGY
    if data.dtype.itemsize == 1:
        level = 3
    elif data.dtype.kind in "iu" and data.size and data.min() >= 0:
        strategy = zlib.Z_RLE
    return zlib.compressobj(level, zlib.DEFLATED, 31, 9, strategy)


def write_nifti(path: os.PathLike[str] | str, data: np.ndarray, affine: np.ndarray) -> None:
    """Write a volume with nothing in its header but its grid; the same input gives the same bytes.

    Args:
        path: ends with ``.nii`` or ``.nii.gz``.
        data: ``(i, j, k)``; any type NIfTI knows.
        affine: RAS+, written as sform, and as qform too when a quaternion holds it to 0.001 mm.
    """
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    if not max_distance_mm(data.shape, image.get_qform(), affine) <= 1e-3:
        image.set_qform(None, 0)
    image.header.set_slope_inter(1, 0)
    image.header["magic"], image.header["vox_offset"] = b"n+1", 352
    parts = [image.header.binaryblock + bytes(4), np.asarray(data, image.get_data_dtype()).tobytes(order="F")]
    with open(path, "wb") as file:
        if str(path).endswith(".gz"):
            packer = _packer(data)
            file.writelines(packer.compress(part) for part in parts)
            file.write(packer.flush())
        else:
            file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
