"""A picture service on this machine that answers as the documented ones, and fails.

Panoramax: items as geovisio/web/items.py of panoramax/server/api makes them. Mapillary:
images with the fields of mapillary.com/developer/api-documentation.
"""

import contextlib
import http.server
import json
import threading
import time
import urllib.parse

import cv2
import numpy as np
from scipy.spatial.transform import Rotation
from synthetic_city import ANCHOR, direction_panorama

from cityrag_jax.geo.ecef import ecef_from_enu, geodetic_from_ecef

TOKEN = "MLY|1234|secret"


class Service:
    """What is served: `pictures` by path, `answer` for the rest.

    `faults` holds, by path, what the next requests get instead: a status, "hang",
    "short" (fewer bytes than announced), "cut" (half a picture) or "garbage".
    """

    def __init__(self):
        self.pictures, self.faults, self.asked = {}, {}, []
        self.answer = lambda path, query, headers: (404, {"message": "nothing here"})

    @contextlib.contextmanager
    def running(self):
        handler = type("Handler", (_Handler,), {"service": self})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            self.port = server.server_address[1]
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def count(self, path):
        return sum(asked == path for asked, _, _ in self.asked)


class _Handler(http.server.BaseHTTPRequestHandler):
    service: Service

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        self.service.asked.append((url.path, query, dict(self.headers)))
        faults = self.service.faults.get(url.path) or [None]
        fault = faults.pop(0) if len(faults) else None
        try:
            self._give(url.path, query, fault)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def _give(self, path, query, fault):
        if fault == "hang":
            time.sleep(0.4)
        if isinstance(fault, tuple):
            return self._send(fault[0], b"later", {"Retry-After": fault[1]})
        if isinstance(fault, int):
            return self._send(fault, b"<html>trouble</html>")
        if path in self.service.pictures:
            content = self.service.pictures[path]
            if fault == "short":
                return self._send(200, content[:-50], more=50)
            if fault == "cut":
                content = content[: len(content) // 2]
            return self._send(200, content)
        status, document = self.service.answer(path, query, self.headers)
        content = json.dumps(document).encode()
        self._send(status, content[:9] if fault == "garbage" else content)

    def _send(self, status, content, headers=None, more=0):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) + more))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def jpeg(pose, height=64):
    """Give the picture of a pose as a JPEG without any tag."""
    picture = direction_panorama(pose, height)
    _, content = cv2.imencode(
        ".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95]
    )
    return content.tobytes()


def place_of(pose, shift_m=(0.0, 0.0)):
    """Give latitude, longitude, height of a pose in the synthetic city."""
    moved = pose.copy()
    moved[:2, 3] += shift_m
    ecef = ecef_from_enu(*ANCHOR) @ moved
    return [float(x) for x in geodetic_from_ecef(ecef[:3, 3])]


def stac_item(name, collection, pose, time_s, url, **facts):
    """Give an item as Panoramax' search does; `facts` replace its properties."""
    latitude, longitude, height_m = place_of(pose)
    moment = np.datetime64(int(time_s * 1000), "ms")
    properties = {
        "datetime": f"{moment}+00:00",
        "license": "etalab-2.0",
        "view:azimuth": round(float(np.rad2deg(np.arctan2(pose[0, 2], pose[1, 2]))))
        % 360,
        "pers:interior_orientation": {
            "camera_manufacturer": "GoPro",
            "camera_model": "Max",
            "field_of_view": 360,
            "sensor_array_dimensions": [5760, 2880],
        },
        "pers:pitch": 0.0,
        "pers:roll": 0.0,
        "geovisio:status": "ready",
        "geovisio:producer": "a driver",
        "quality:horizontal_accuracy": 4.0,
        "exif": {"Exif.GPSInfo.GPSAltitude": f"{round(height_m * 100)}/100"},
    } | facts
    api = url.rsplit("/", 1)[0]
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": name,
        "collection": collection,
        "geometry": {"type": "Point", "coordinates": [longitude, latitude]},
        "bbox": [longitude, latitude, longitude, latitude],
        "providers": [{"name": "a driver", "roles": ["producer"], "id": "7"}],
        "properties": {k: v for k, v in properties.items() if v is not None},
        "links": [
            {"rel": "collection", "href": f"{api}/collections/{collection}"},
            {"rel": "self", "href": f"{api}/collections/{collection}/items/{name}"},
        ],
        "assets": {
            "hd": {"roles": ["data"], "type": "image/jpeg", "href": url},
            "sd": {"roles": ["visual"], "type": "image/jpeg", "href": url + "?sd"},
        },
    }


def mapillary_image(name, sequence, pose, time_s, url, group, shift_m=(0.0, 0.0)):
    """Give an image as /images does; `shift_m` is how its group was computed off."""
    latitude, longitude, height_m = place_of(pose)
    moved = place_of(pose, shift_m)
    camera_from_enu = Rotation.from_matrix(pose[:3, :3].T)
    return {
        "id": name,
        "sequence": sequence,
        "captured_at": int(time_s * 1000),
        "is_pano": True,
        "camera_type": "spherical",
        "geometry": {"type": "Point", "coordinates": [longitude, latitude]},
        "computed_geometry": {"type": "Point", "coordinates": [moved[1], moved[0]]},
        "altitude": height_m + 30,
        "computed_altitude": height_m,
        "compass_angle": 123.0,
        "computed_compass_angle": 124.0,
        "computed_rotation": camera_from_enu.as_rotvec().tolist(),
        "merge_cc": group,
        "creator": {"username": "someone", "id": "9"},
        "thumb_original_url": url,
    }


def search(items, place, box, limit):
    """Give what lies in a box, at most so many."""
    west, south, east, north = map(float, box.split(","))
    found = [
        item
        for item in items
        if west <= place(item)[0] <= east and south <= place(item)[1] <= north
    ]
    return found[: int(limit)]
