"""Paths from text: every shape that people have, and errors that name the place."""

import json

import numpy as np
import pytest

from cityrag_jax.geo.path_files import parse_path

LINE = {"type": "LineString", "coordinates": [[11.5, 48.1], [11.6, 48.2, 510.0]]}
EXPECTED = [[48.1, 11.5, np.nan], [48.2, 11.6, 510.0]]


def feature(geometry):
    return {"type": "Feature", "properties": {}, "geometry": geometry}


def point(*coordinates):
    return feature({"type": "Point", "coordinates": list(coordinates)})


@pytest.mark.parametrize(
    "document",
    [
        LINE,
        LINE["coordinates"],
        feature(LINE),
        {"type": "FeatureCollection", "features": [point(0, 0), feature(LINE)]},
        {
            "type": "FeatureCollection",
            "features": [point(11.5, 48.1), point(11.6, 48.2, 510.0)],
        },
        {"type": "GeometryCollection", "geometries": [LINE]},
        {"type": "MultiLineString", "coordinates": [LINE["coordinates"]]},
        {"type": "MultiPoint", "coordinates": LINE["coordinates"]},
        {"type": "Polygon", "coordinates": [LINE["coordinates"], [[0, 0], [1, 1]]]},
    ],
)
def test_geojson_of_every_shape_gives_its_line(document):
    path = parse_path(json.dumps(document), "walk.geojson")
    np.testing.assert_array_equal(path, EXPECTED)


@pytest.mark.parametrize(
    "text",
    [
        "48.1, 11.5\n\n48.2,11.6,510\n",
        "latitude,longitude,height\n48.1,11.5,\n48.2,11.6,510",
        "lat,lon\n48.1,11.5\n48.2,11.6\n",
        "\ufefflatitude;longitude;height\r\n48,1;11,5;\r\n48,2;11,6;510\r\n",
        "lng\tlat\tele\n11.5\t48.1\t\n11.6\t48.2\t510\n",
        "name,lat,lng,alt\nstart,48.1,11.5,\nend,48.2,11.6,510\n",
        "timestamp,lat,lon,ele,speed\n2024-05-01T10:00:00Z,48.1,11.5,,3\n1,48.2,11.6,510,4\n",
    ],
)
def test_csv_is_read_by_the_names_of_its_columns(text):
    path = parse_path(text, "walk.CSV")
    expected = np.array(EXPECTED)
    expected[1, 2] = 510.0 if "510" in text else np.nan
    np.testing.assert_array_equal(path, expected)


def test_gpx_gives_its_track_or_route_or_waypoints():
    head = '<gpx xmlns="http://www.topografix.com/GPX/1/1">'
    points = (
        '<{0} lat="48.1" lon="11.5"/><{0} lat="48.2" lon="11.6"><ele>510</ele></{0}>'
    )
    for body in (
        f"<trk><trkseg>{points.format('trkpt')}</trkseg></trk>",
        f"<rte>{points.format('rtept')}</rte>",
        points.format("wpt"),
    ):
        path = parse_path(f"<?xml version='1.0'?>{head}{body}</gpx>", "walk.gpx")
        np.testing.assert_array_equal(path, EXPECTED)


def test_kml_gives_its_line_or_track_or_points():
    head = (
        '<kml xmlns="http://www.opengis.net/kml/2.2" '
        'xmlns:gx="http://www.google.com/kml/ext/2.2">'
    )
    for body in (
        "<Document><Placemark><LineString><coordinates>\n 11.5,48.1\n11.6,48.2,510 "
        "</coordinates></LineString></Placemark></Document>",
        "<gx:Track><gx:coord>11.5 48.1</gx:coord><gx:coord>11.6 48.2 510</gx:coord>"
        "</gx:Track>",
        "<Placemark><Point><coordinates>11.5,48.1</coordinates></Point></Placemark>"
        "<Placemark><Point><coordinates>11.6,48.2,510</coordinates></Point></Placemark>",
    ):
        path = parse_path(f"{head}{body}</kml>", "walk.kml")
        np.testing.assert_array_equal(path, EXPECTED)


def test_lines_whose_ends_meet_are_one_and_others_are_refused():
    """In any order and direction; 1e-5 degrees are a metre."""
    parts = [[[3e-3, 0], [2e-3, 0]], [[0, 0], [1e-3, 0]], [[1.01e-3, 0], [2e-3, 0]]]
    document = {"type": "MultiLineString", "coordinates": parts}
    path = parse_path(json.dumps(document), "walk.geojson")
    wanted = [3e-3, 2e-3, 2e-3, 1.01e-3, 1e-3, 0]
    np.testing.assert_array_equal(path[:, 1], wanted)
    document["coordinates"] = parts[:2]
    with pytest.raises(ValueError, match="2 lines that do not meet.* 111 m apart"):
        parse_path(json.dumps(document), "walk.geojson")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.shp", "", "a.shp: paths are read from .geojson, .json, .gpx, .kml, .csv"),
        ("a.kmz", "", "unzip it and give the .kml"),
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", "{}", "a.json holds no geometry, but no LineString"),
        ("a.json", '{"type": "LineString", "coordinates": null}', "of a line are None"),
        ("a.json", "[[1, 2], 3]", "point 2 is 3"),
        ("a.json", '{"type": "LineString", "coordinates": [[1, 2]]}', "1 points"),
        ("a.json", '{"type": "LineString", "coordinates": [[1, 95], [1, 2]]}', "95"),
        ("a.gpx", "<gpx/>", "a.gpx holds 0 points"),
        ("a.gpx", "<kml/>", "a.gpx is kml, not gpx"),
        ("a.gpx", '<gpx><wpt lat="1"/><wpt lat="2" lon="3"/></gpx>', "point 1 is"),
        ("a.kml", "<kml", "a.kml is not XML"),
        ("a.csv", "48,11\n48,x\n", "point 2 is"),
        ("a.csv", "48,11\n48\n", "line 2: 1 values"),
        ("a.csv", "48,11,3,4\n", "line 1: 4 values"),
        ("a.csv", "lat,latitude,lon\n1,2,3\n3,4,5\n", "2 of them the latitude"),
        ("a.csv", "lat,name\n1,2\n3,4\n", "0 of them the longitude"),
        ("a.csv", "", "a.csv holds 0 points"),
        ("a.csv", "nan,1\n2,3\n", "point 1 has latitude nan"),
    ],
)
def test_bad_text_names_the_file_and_the_place(name, text, message):
    with pytest.raises(ValueError, match=message):
        parse_path(text, name)
