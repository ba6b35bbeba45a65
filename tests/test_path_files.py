"""Paths from text: GeoJSON and CSV, and errors that name the file and the point."""

import json

import numpy as np
import pytest

from cityrag_jax.geo.path_files import parse_path

LINE = {"type": "LineString", "coordinates": [[11.5, 48.1], [11.6, 48.2, 510.0]]}
EXPECTED = [[48.1, 11.5, np.nan], [48.2, 11.6, 510.0]]


@pytest.mark.parametrize(
    "document",
    [
        LINE,
        {"type": "Feature", "properties": {}, "geometry": LINE},
        {
            "type": "FeatureCollection",
            "features": [
                {
                    "type": "Feature",
                    "geometry": {"type": "Point", "coordinates": [0, 0]},
                },
                {"type": "Feature", "geometry": LINE},
            ],
        },
        {"type": "GeometryCollection", "geometries": [LINE]},
    ],
)
def test_geojson_line_is_found_in_every_wrapping(document):
    path = parse_path(json.dumps(document), "walk.geojson")
    np.testing.assert_array_equal(path, EXPECTED)


@pytest.mark.parametrize("head", ["", "latitude,longitude,height\n", "lat,lon\n"])
def test_csv_reads_with_and_without_names(head):
    path = parse_path(head + "48.1, 11.5\n\n48.2,11.6,510\n", "walk.CSV")
    np.testing.assert_array_equal(path, EXPECTED)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.kml", "<kml/>", "a.kml: paths are read from .geojson and .csv"),
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", "{}", "a.json holds 0 LineStrings"),
        (
            "a.json",
            '{"type": "LineString", "coordinates": [[1, 2], 3]}',
            "point 2 is 3",
        ),
        ("a.json", '{"type": "LineString", "coordinates": [[1, 2]]}', "1 points"),
        ("a.json", '{"type": "LineString", "coordinates": [[1, 95], [1, 2]]}', "95"),
        ("a.csv", "48,11\n48,x\n", "point 2 is"),
        ("a.csv", "48,11\n48\n", "line 2: 1 values"),
        ("a.csv", "lon,lat\n1,2\n3,4\n", "they must be latitude,longitude"),
        ("a.csv", "", "a.csv holds 0 points"),
        ("a.csv", "nan,1\n2,3\n", "point 1 has latitude nan"),
    ],
)
def test_bad_text_names_the_file_and_the_place(name, text, message):
    with pytest.raises(ValueError, match=message):
        parse_path(text, name)
