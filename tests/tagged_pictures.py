"""Pictures with EXIF and GPano tags, as 360-degree cameras and phones write them."""

import datetime

import numpy as np
from PIL import ExifTags, Image

Gps, Base = ExifTags.GPS, ExifTags.Base


def degrees(value):
    """Give degrees, minutes and seconds, as EXIF stores them."""
    value = abs(value)
    minutes = value % 1 * 60
    return (float(int(value)), float(int(minutes)), round(minutes % 1 * 60, 6))


def exif_of(
    *,
    place=None,
    height_m=None,
    heading_deg=None,
    magnetic=False,
    time_s=None,
    zone="+00:00",
    gps_time=False,
    focal_mm=None,
    orientation=None,
):
    """Give EXIF with what is known; `time_s` is Unix time, written in the zone."""
    exif = Image.Exif()
    exif[Base.Make] = "Camera"
    gps, photo = {}, {}
    if place is not None:
        gps[Gps.GPSLatitudeRef] = "N" if place[0] >= 0 else "S"
        gps[Gps.GPSLatitude] = degrees(place[0])
        gps[Gps.GPSLongitudeRef] = "E" if place[1] >= 0 else "W"
        gps[Gps.GPSLongitude] = degrees(place[1])
    if height_m is not None:
        gps[Gps.GPSAltitudeRef] = b"\1" if height_m < 0 else b"\0"
        gps[Gps.GPSAltitude] = abs(height_m)
    if heading_deg is not None:
        gps[Gps.GPSImgDirectionRef] = "M" if magnetic else "T"
        gps[Gps.GPSImgDirection] = heading_deg % 360
    if time_s is not None:
        sign, hours = (-1 if zone[:1] == "-" else 1), int((zone or "+00")[1:3])
        local = datetime.datetime.fromtimestamp(
            time_s + sign * 3600 * hours, datetime.UTC
        )
        photo[Base.DateTimeOriginal] = local.strftime("%Y:%m:%d %H:%M:%S")
        photo[Base.SubsecTimeOriginal] = f"{local.microsecond // 1000:03d}"
        if gps_time:
            utc = datetime.datetime.fromtimestamp(time_s, datetime.UTC)
            gps[Gps.GPSDateStamp] = utc.strftime("%Y:%m:%d")
            gps[Gps.GPSTimeStamp] = tuple(
                float(x) for x in (utc.hour, utc.minute, utc.second)
            )
        elif zone:
            photo[Base.OffsetTimeOriginal] = zone
    if focal_mm is not None:
        photo[Base.FocalLengthIn35mmFilm] = focal_mm
    if orientation is not None:
        exif[Base.Orientation] = orientation
    exif.get_ifd(ExifTags.IFD.GPSInfo).update(gps)
    exif.get_ifd(ExifTags.IFD.Exif).update(photo)
    return exif


def gpano(**told) -> bytes:
    """Give an XMP packet with GPano's properties."""
    inside = " ".join(f'GPano:{name}="{value}"' for name, value in told.items())
    return (
        '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" '
        f'xmlns:GPano="http://ns.google.com/photos/1.0/panorama/" {inside}/>'
        '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def save(path, picture, xmp=b"", **tags):
    """Write a picture with its tags."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"xmp": xmp} if xmp else {}
    image = Image.fromarray(np.ascontiguousarray(picture))
    image.save(path, exif=exif_of(**tags), quality=95, **kinds)
