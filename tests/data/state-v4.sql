-- A state.db of schema version 4: where a replica was placed. Never change it: every later gateway must read it.
PRAGMA user_version = 4;
PRAGMA application_id = 1397442388;
BEGIN TRANSACTION;
CREATE TABLE cold_starts (
            id INTEGER PRIMARY KEY, service TEXT NOT NULL, spec_hash TEXT NOT NULL, plan TEXT NOT NULL,
            phase TEXT NOT NULL, seconds REAL NOT NULL, at REAL NOT NULL);
INSERT INTO "cold_starts" VALUES(1,'r1','c0ffee','local','load',410.0,1700000300.0);
CREATE TABLE events (
            id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, event TEXT NOT NULL);
INSERT INTO "events" VALUES(1,1700000900.0,'{"kind": "launch", "replica": "r1-gw-0a1b2c3d-3", "reason": "3 requests wait"}');
CREATE TABLE ledger (
            replica TEXT NOT NULL, part INTEGER NOT NULL, service TEXT NOT NULL, plan TEXT NOT NULL,
            region TEXT NOT NULL, spot INTEGER, price REAL, begun REAL NOT NULL, until REAL NOT NULL,
            dollars REAL NOT NULL, ready REAL NOT NULL, idle REAL NOT NULL, key TEXT NOT NULL,
            request TEXT NOT NULL, closed INTEGER NOT NULL, PRIMARY KEY (replica, part));
INSERT INTO "ledger" VALUES('r1-gw-0a1b2c3d-2',1,'r1','H200:8x1 spot','aws/us-east-1',1,59.5,1700000000.0,1700000500.0,8.25,300.0,120.0,'alice','req-1',1);
INSERT INTO "ledger" VALUES('r1-gw-0a1b2c3d-3',1,'r1','H200:8x1 spot','',NULL,59.5,1700000900.0,1.70000099075630259513e+09,1.5,0.0,0.0,'','',0);
CREATE TABLE limits (
            service TEXT PRIMARY KEY, min INTEGER, max INTEGER, spec_hash TEXT NOT NULL);
INSERT INTO "limits" VALUES('r1',0,NULL,'c0ffee');
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO "meta" VALUES('owner','0a1b2c3d');
INSERT INTO "meta" VALUES('generation','41');
CREATE TABLE replicas (
            id TEXT PRIMARY KEY, service TEXT NOT NULL, n INTEGER NOT NULL, slot INTEGER NOT NULL,
            spec_hash TEXT NOT NULL, spec_text TEXT NOT NULL, state TEXT NOT NULL, since REAL NOT NULL,
            created_at REAL NOT NULL, url TEXT, phase TEXT, phase_since REAL, progress REAL,
            reason TEXT NOT NULL, failure TEXT, failing_since REAL, launched_at REAL, ready_at REAL,
            hourly_cost REAL, "window" INTEGER, resumable INTEGER NOT NULL, plan TEXT NOT NULL DEFAULT '', region TEXT NOT NULL DEFAULT '', spot INTEGER,
            UNIQUE (service, n));
INSERT INTO "replicas" VALUES('r1-gw-0a1b2c3d-2','r1',2,1,'c0ffee','name: r1
','gone',1700000500.0,1700000000.0,NULL,NULL,NULL,NULL,'idle for 20 minutes',NULL,NULL,NULL,1700000300.0,59.5,NULL,0,'H200:8x1 spot','aws/us-east-1/us-east-1a',1);
INSERT INTO "replicas" VALUES('r1-gw-0a1b2c3d-3','r1',3,2,'c0ffee','name: r1
','starting',1700001000.5,1700000900.0,'http://10.0.0.3:30000','load',1700001100.0,0.62,'3 requests wait',NULL,NULL,1700001000.5,NULL,59.5,NULL,0,'H200:8x1 spot','',NULL);
CREATE TABLE services (
            name TEXT PRIMARY KEY, last_n INTEGER NOT NULL DEFAULT 0, replica_key TEXT, breaker TEXT);
INSERT INTO "services" VALUES('r1',3,'abababababababababababababababababababababababab','{"failures": 2}');
CREATE INDEX replicas_by_state ON replicas (state);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('events',1);
COMMIT;
